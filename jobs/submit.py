"""Submit a command to a running Ray, follow it, and exit with its own exit code.

python jobs/submit.py [--address URL] [--pass NAME].. -- prune|sweep|evaluate ARGUMENT..

  submit.py -- prune --model huggyllama/llama-7b --sparsity 0.7 --output /outputs/llama-7b-70 --resume
  submit.py --pass HF_TOKEN -- evaluate --model /outputs/llama-7b-70 --evaluate wikitext2,zero-shot
  submit.py --working-dir . --exclude runs -- sweep jobs/language.toml --output /outputs/language --resume

The cluster's token is read from where Ray itself reads it: RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH=FILE.
Exit codes: that of the program (0 done, 2 bad input, 1 anything else); 130 when the job was stopped, by Ctrl-C or by
others; 128 plus the number of the signal that ended the program; 1 when the job never started.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence

COMMANDS = ("prune", "sweep", "evaluate")
BAD_INPUT, STOPPED = 2, 130
TOKEN_NEEDED = "wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
SECONDS_BETWEEN_LOOKS = 1.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options and the command after them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address", default="http://127.0.0.1:8265", help="address of the head's dashboard (default: %(default)s)"
    )
    parser.add_argument(
        "--working-dir", help="folder to upload; if absent, the package in the image of the nodes is used"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files that are not uploaded, besides those of .rayignore",
    )
    parser.add_argument("--id", help="id of the job; if absent, Ray makes one")
    parser.add_argument(
        "--pass",
        dest="names",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable to pass on; not printed, but everybody with the cluster's token can read it",
    )
    parser.add_argument("command", nargs="+", help=f"one of {', '.join(COMMANDS)}, and its arguments, after --")
    options = parser.parse_args(argv)
    if options.command[0] not in COMMANDS:
        parser.error(f"{options.command[0]!r} is not a command, expected one of {', '.join(COMMANDS)}")
    if options.exclude and options.working_dir is None:
        parser.error("--exclude: needs --working-dir, without which nothing is uploaded")
    if missing := [name for name in options.names if name not in os.environ]:
        parser.error(f"--pass: {', '.join(missing)} not set in this environment")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of the program, or 130 when the job was stopped."""
    options = parse(sys.argv[1:] if argv is None else argv)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # they would win over --address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(options.address)
    except AuthenticationError:
        print(f"submit.py: error: --address: {options.address} {TOKEN_NEEDED}", file=sys.stderr)
        return BAD_INPUT
    except ConnectionError:
        print(f"submit.py: error: --address: no Ray answers at {options.address}", file=sys.stderr)
        return BAD_INPUT
    runtime: dict[str, object] = {"env_vars": {name: os.environ[name] for name in options.names}}
    if options.working_dir is not None:
        runtime |= {"working_dir": options.working_dir, "excludes": options.exclude}
    program, *arguments = options.command
    job = client.submit_job(
        entrypoint=shlex.join(["python", "-m", f"neuronal_ray.{program}", *arguments]),
        submission_id=options.id,
        runtime_env=runtime,
    )
    print(f"job {job} submitted", file=sys.stderr)
    seen = 0
    try:
        while True:
            over = client.get_job_status(job).is_terminal()
            logs = client.get_job_logs(job)
            print(logs[seen:], end="", flush=True)
            seen = len(logs)
            if over:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        client.stop_job(job)
        print(f"job {job} stopped", file=sys.stderr)
        return STOPPED
    info = client.get_job_info(job)
    if info.status == JobStatus.STOPPED:
        return STOPPED
    if info.driver_exit_code is None:
        print(info.message, file=sys.stderr)
        return 1
    code = int(info.driver_exit_code)
    return code if code >= 0 else 128 - code  # of a signal, as a shell has it


if __name__ == "__main__":
    sys.exit(main())
