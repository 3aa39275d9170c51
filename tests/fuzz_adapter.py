"""Adapter files as an attacker would write them, and what must hold for every one of them.

python tests/fuzz_adapter.py --cases 100000
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from gsoft.rotation import parameter_shapes  # noqa: E402
from gsoft_diffusion.adapters.file import FORMAT, read_adapter  # noqa: E402
from gsoft_diffusion.config import AdapterConfig  # noqa: E402
from gsoft_diffusion.foundation.errors import UserError  # noqa: E402

MEMORY = (
    256 * 2**20
)  # bytes that reading any of these files, all below a megabyte, may take beyond what was there before
HANG = 20  # seconds
ROUND = 5_000  # cases in one process


def valid_file() -> bytes:
    """A small adapter file that is read without complaint."""
    config = AdapterConfig(nblocks=4)
    shapes = {
        f"unet.mid.{name}.{parameter}": shape
        for name in ("to_q", "to_k")
        for parameter, shape in parameter_shapes(config, 16, 16, name).items()
    }
    sections = {
        "config": config.to_dict(),
        "base_model": {"name": "a/b", "fingerprint": "0123456789abcdef:+0.1000"},
        "training": {"learning_rate": 1e-4, "sampler": {"num_inference_steps": 3}},
        "prompts": {"instance_prompt": "a photo"},
    }
    metadata = {FORMAT.key: FORMAT.version} | {name: json.dumps(section) for name, section in sections.items()}
    shapes[f"parametrization.{config.parametrization}"] = (0,)
    return save({name: torch.zeros(shape) for name, shape in shapes.items()}, metadata)


VALID = valid_file()
HEADER = json.loads(VALID[8 : 8 + struct.unpack("<Q", VALID[:8])[0]])
DATA = VALID[8 + struct.unpack("<Q", VALID[:8])[0] :]

Pairs = list[tuple[str, Any]]  # a JSON object in which a name may come twice

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**32 + 1, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 10**12]),
    st.floats(),
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "F32",
            "F64",
            "F16",
            "BF16",
            "I8",
            "U8",
            "BOOL",
            "F8_E4M3",
            "dtype",
            "shape",
            "data_offsets",
            "__metadata__",
            "config",
            "base_model",
        ]
    ),
    st.sampled_from(
        ["q_in", "q_out", "output_scale", "unet.mid.to_q.q_in", "unet.x.q_in", "../../x.q_in", "/etc/passwd"]
    ),
    st.sampled_from(["cayley", "exp", "dense", "NaN", "__class__", "os.system", "\x1b[2J", "\ud800", "\x00"]),
)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


@st.composite
def hostile_files(draw: st.DrawFn) -> bytes:
    """A valid file after a few changes of what it says and of its bytes; at times just bytes."""
    if draw(st.integers(0, 50)) == 0:
        return draw(st.binary(max_size=200))
    pairs: Pairs = [(name, list(entry.items())) for name, entry in HEADER.items()]
    for _ in range(draw(st.integers(0, 3))):
        pairs = change(draw, pairs, draw(st.integers(0, 2)) > 0)
    header = bytearray(dump(pairs).encode(errors="surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        change_bytes(draw, header)
    data = bytearray(DATA)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        change_bytes(draw, data)
    length = len(header) if draw(st.integers(0, 9)) else draw(st.integers(0, 2**64 - 1) | st.integers(0, 2000))
    content = struct.pack("<Q", length) + header + data
    return bytes(content) if draw(st.integers(0, 19)) else bytes(content[: draw(st.integers(0, len(content)))])


def change(draw: st.DrawFn, pairs: Pairs, deeper: bool) -> Pairs:
    """The object with one member removed, added, doubled, renamed or given another value; or one inside a member."""
    pairs = list(pairs)
    if not pairs:
        return [(draw(texts), draw(values))]
    at = draw(st.integers(0, len(pairs) - 1))
    name, value = pairs[at]
    if deeper and isinstance(value, list) and value and isinstance(value[0], tuple):
        pairs[at] = (name, change(draw, value, False))
    elif deeper and isinstance(value, str) and value.startswith("{"):  # JSON in JSON: the sections of the metadata
        pairs[at] = (name, dump(change(draw, list(json.loads(value).items()), False)))
    else:
        kind = draw(st.sampled_from(["remove", "add", "double", "rename", "value", "value", "value"]))
        if kind == "remove":
            del pairs[at]
        elif kind == "add":
            pairs.insert(at, (draw(texts), draw(values)))
        elif kind == "double":
            pairs.append((name, draw(st.just(value) | values)))
        elif kind == "rename":
            pairs[at] = (draw(texts), value)
        else:
            pairs[at] = (name, draw(near(value) | values))
    return pairs


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same kind: shapes and offsets that lie, other texts."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        return st.lists(numbers | st.sampled_from(value), min_size=len(value), max_size=len(value))
    return texts if isinstance(value, str) else numbers


def dump(value: Any) -> str:
    """JSON, with names that come twice where the pairs say so."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        return "{" + ",".join(f"{json.dumps(name)}:{dump(inner)}" for name, inner in value) + "}"
    return json.dumps(value)


def change_bytes(draw: st.DrawFn, content: bytearray) -> None:
    at = draw(st.integers(0, len(content)))
    with_ = draw(
        st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"[" * 3000, b"\\u0000", b"9" * 5000, b"\xff\x7f"])
    )
    content[at : at + draw(st.integers(0, 8))] = with_


def check(path: Path, content: bytes) -> str:
    """Read the file, or have it refused; anything else is an error. Returns what became of it."""
    path.write_bytes(content)
    try:
        file = read_adapter(path)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert message.isprintable(), message
        assert len(message) < 1100, message
        return "refused: " + " ".join(message.removeprefix(str(path)).split()[:7])
    assert sum(tensor.nbytes for tensor in file.tensors.values()) <= len(content)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in file.tensors.values())
    assert AdapterConfig.from_dict(file.config.to_dict()) == file.config
    return "read"


def run_round(number: int, cases: int) -> tuple[Counter[str], int]:
    """Many cases in this process, with an end to its memory; how often what came out, and the growth in bytes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"

        @seed(number)
        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(hostile_files())
        def every_file_is_read_or_refused(content: bytes) -> None:
            signal.alarm(HANG)  # whose default is to end the process
            outcomes[check(path, content)] += 1
            signal.alarm(0)

        every_file_is_read_or_refused()
    return outcomes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def round_in_a_process(number: int, cases: int) -> tuple[Counter[str], int]:
    """`run_round` in a process of its own. Raises SystemExit if a file crashes the reader, or hangs it."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        try:
            return pool.submit(run_round, number, cases).result()
        except BrokenProcessPool:
            raise SystemExit(
                f"seed {number}: one of {cases} files crashed the reader, or hung it for {HANG} seconds; "
                f"run_round({number}, {cases}) in tests/fuzz_adapter.py repeats this"
            ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    cases = parser.parse_args().cases
    started, outcomes, growth = time.time(), Counter[str](), 0
    rounds = [(number, min(ROUND, cases - start)) for number, start in enumerate(range(0, cases, ROUND))]
    for number, count in rounds:
        found, grown = round_in_a_process(number, count)
        outcomes += found
        growth = max(growth, grown)
        print(f"round {number + 1} of {len(rounds)}: {sum(outcomes.values())} cases", file=sys.stderr, flush=True)
    print(f"cases: {sum(outcomes.values())}, each read or refused; the first crash, hang or wrong answer ends this")
    print(
        f"seconds: {time.time() - started:.0f}; largest growth of a process of {ROUND} cases: {growth / 2**20:.0f} MiB"
    )
    print(f"read, since still valid: {outcomes.pop('read', 0)}; refused: {sum(outcomes.values())}, by reason:")
    for reason, count in outcomes.most_common(40):
        print(f"{count:7} {reason.removeprefix('refused: ')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
