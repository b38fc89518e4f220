"""Are the bytes of this process and of the machine what Linux says?"""

from neuronal_ray.cli.memory import machine_bytes, peak_bytes, private_bytes, reset_peak, resident_bytes

SIZE = 2**26


def test_memory_that_is_taken_is_counted_and_the_peak_stays() -> None:
    reset_peak()
    before, own = resident_bytes(), private_bytes()
    taken = bytearray(b"1") * SIZE
    assert resident_bytes() - before > SIZE // 2
    assert private_bytes() - own > SIZE // 2
    del taken
    assert peak_bytes() - before > SIZE // 2
    assert 0 < private_bytes() <= resident_bytes() <= peak_bytes() < machine_bytes()
