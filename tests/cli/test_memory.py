"""Are the bytes of this process and of the machine what Linux says?"""

import mmap

from neuronal_ray.cli.memory import machine_bytes, peak_bytes, private_bytes, reset_peak, resident_bytes

SIZE = 2**26


def test_memory_that_is_taken_is_counted_and_the_peak_stays() -> None:
    reset_peak()
    before, own = resident_bytes(), private_bytes()
    taken = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)  # never memory that the allocator has already
    taken.write(b"1" * SIZE)
    assert resident_bytes() - before > SIZE // 2
    assert private_bytes() - own > SIZE // 2
    taken.close()
    assert peak_bytes() - before > SIZE // 2
    assert 0 < private_bytes() <= resident_bytes() <= peak_bytes() < machine_bytes()
