"""How fast this machine is: measured in a few seconds, and kept for the next time.

What a training step is made of is timed on its own: matrix products of three heights, thin ones
like an adapter's, elementwise work on new memory, softmax over a vocabulary, attention, the
optimizer, and the cost of starting an operation. Products are measured in the dtype of the
training.

Where no device can be measured (``--gpu``), a table of known GPUs stands in for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorakit.core.files import cache_dir, write_atomic
from lorakit.errors import InputError
from lorakit.layers.attention import computed_in

log = logging.getLogger(__name__)

#: heights of the products that are timed
ROWS = (64, 256, 1024)
#: inner and outer widths: those of a model of 100 million and one of a few billion parameters
WIDTHS = (640, 2048)
#: ranks whose thin products are timed
RANKS = (8, 64)
#: seconds for each of the timings; there are less than twenty
_SECONDS = 0.3
#: raised when what is measured changes
_LAYOUT = 5


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    name: str
    gemm: Mapping[str, float]
    """``"rows x width"`` → floating-point operations of a product [rows, w] · [w, w]."""
    thin: Mapping[str, float]
    """``"rank"`` → floating-point operations of a product with a factor of that rank."""
    elementwise: float
    """Bytes read and written by ``silu(a) * b`` into new memory."""
    softmax: float
    """Logits that become a loss and its gradient."""
    attention: float
    """Floating-point operations of attention, forward and backward."""
    optimizer: float
    """Parameters that AdamW moves."""
    unpack: float
    """Numbers of four bits that become float."""
    fresh: float
    """Bytes written to memory that the process did not have before."""
    overhead: float
    """Seconds that one operation of a layer takes, however small: a view or two, a product."""
    measured: bool = True
    """``False``: from a table."""

    def gemm_rate(self, rows: float, width: float) -> float:
        """Operations a second of products of ``rows`` rows, between the measured sizes."""

        def of_height(w: int) -> float:
            return _between(rows, ROWS, lambda n: self.gemm[f"{n}x{w}"])

        return _between(width, WIDTHS, of_height)

    def thin_rate(self, rank: float) -> float:
        """The same of products with a factor of this rank."""
        return _between(rank, RANKS, lambda r: self.thin[str(r)])


def _between(x: float, known: tuple[int, ...], value: Callable[[int], float]) -> float:
    """Along a straight line between two known places; beyond them the nearest."""
    if x <= known[0]:
        return value(known[0])
    for low, high in itertools.pairwise(known):
        if x <= high:
            share = (x - low) / (high - low)
            return (1 - share) * value(low) + share * value(high)
    return value(known[-1])


# --- measuring ---------------------------------------------------------------------------------


def measured_rates(
    dtype: torch.dtype, device: torch.device, *, fresh: bool = False
) -> tuple[Rates, bool]:
    """The rates of a device of this machine, measured now or before.

    They are kept in the cache under the machine, torch's version, its threads, device and dtype.

    Args:
        fresh: measure even if they are known: where other programs take turns on the processor,
            the rates of another hour do not hold.

    Returns:
        The rates, and whether they were measured now.
    """
    path = _cache_path(dtype, device)
    if not fresh:
        known = _read(path)
        if known is not None:
            return known, False
    rates = calibrate(dtype, device)
    content = json.dumps(dataclasses.asdict(rates), indent=1)
    write_atomic(path, content.encode())
    return rates, True


def _cache_path(dtype: torch.dtype, device: torch.device) -> Path:
    facts = [platform.node(), platform.machine(), torch.__version__, torch.get_num_threads()]
    facts += [device_name(device), str(dtype), _LAYOUT]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return cache_dir() / "rates" / f"{digest}.json"


def _read(path: Path) -> Rates | None:
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        log.debug("no rates in %s: %s", path, error)
        return None


def device_name(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    return str(device)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


@torch.no_grad()
def calibrate(
    dtype: torch.dtype, device: torch.device, *, timer: Callable[[], float] = time.perf_counter
) -> Rates:
    """Measure; five seconds.

    Args:
        timer: seconds; ``time.process_time`` with one thread leaves out the turns of others.
    """

    def made(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(kind)

    def clock(run: Callable[[], Any]) -> float:
        return _seconds(run, device, timer)

    gemm = {}
    for width in WIDTHS:
        weight = made(width, width)
        for rows in ROWS:
            x = made(rows, width)
            seconds = clock(lambda x=x, w=weight: F.linear(x, w))  # type: ignore[misc]
            gemm[f"{rows}x{width}"] = 2 * rows * width * width / seconds
    # as fused layers compute adapters and attention
    precise = computed_in(torch.empty(0, device=device, dtype=dtype))
    x = made(1024, WIDTHS[0], kind=precise)
    thin = {}
    for rank in RANKS:
        A = made(rank, WIDTHS[0], kind=precise)
        seconds = clock(lambda A=A: F.linear(x, A))  # type: ignore[misc]
        thin[str(rank)] = 2 * 1024 * WIDTHS[0] * rank / seconds
    a, b = made(1024, 2048), made(1024, 2048)
    # silu reads and writes once, the product reads twice and writes once
    moved = 5 * a.numel() * a.element_size()
    logits = made(64, 16384)
    small = torch.ones(8, 8, device=device)
    packed = torch.randint(0, 256, (1 << 20,), device=device, dtype=torch.uint8)
    code = made(16)
    return Rates(
        name=device_name(device),
        gemm=gemm,
        thin=thin,
        elementwise=moved / clock(lambda: F.silu(a).mul_(b)),
        softmax=logits.numel() / clock(lambda: torch.log_softmax(logits.float(), -1).exp_()),
        attention=_attention_rate(partial(made, kind=precise), clock),
        optimizer=_optimizer_rate(device, clock),
        unpack=2 * packed.numel() / clock(lambda: _unpacked(packed, code)),
        fresh=(1 << 26) / clock(lambda: torch.zeros(1 << 24, device=device).add_(1)),
        overhead=clock(lambda: [torch.addmm(small, small[:, :4], small[:4]) for _ in range(99)])
        / 99,
    )


def _unpacked(packed: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    values = torch.stack([code[(packed >> 4).long()], code[(packed & 15).long()]], dim=-1)
    return values.view(-1, 64) * 2.0


def _attention_rate(made: Callable[..., torch.Tensor], clock: Callable[[Any], float]) -> float:
    heads, length, width = 8, 256, 64
    q, k, v = (made(1, heads, length, width).requires_grad_() for _ in range(3))

    def both() -> None:
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out.sum(), (q, k, v))

    return attention_operations(heads * width, length**2) / clock(both)


def attention_operations(query: int, squares: int) -> float:
    """Of one layer, forward and backward: two products of n × n by the heads' features forward
    and five backward, half of each masked away."""
    return 7 * query * squares


def _optimizer_rate(device: torch.device, clock: Callable[[Any], float]) -> float:
    weights = torch.nn.Parameter(torch.zeros(1 << 23, device=device))  # larger than caches
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=device.type in ("cpu", "cuda"))
    return weights.numel() / clock(optimizer.step)


def _seconds(run: Callable[[], Any], device: torch.device, timer: Callable[[], float]) -> float:
    """The mean of some runs, after one that does not count."""

    def once() -> float:
        started = timer()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return timer() - started

    once()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        times.append(once())
    # the mean, not the median: where programs take turns, a step waits for them too
    return max(sum(times) / len(times), 1e-9)


# --- known GPUs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU that is not here."""

    name: str
    memory: int
    """Bytes."""
    rates: Rates | None = field(default=None, compare=False)
    """``None`` where only its memory is known."""


#: name → (GiB, dense bfloat16 products in TFLOP/s, memory bandwidth in GB/s), from the makers'
#: data sheets
KNOWN_GPUS: Mapping[str, tuple[float, float, float]] = {
    "RTX 3060": (12, 51, 360),
    "RTX 3090": (24, 71, 936),
    "RTX 4060 Ti": (16, 88, 288),
    "RTX 4070": (12, 117, 504),
    "RTX 4090": (24, 165, 1008),
    "RTX 5090": (32, 210, 1792),
    "L4": (24, 121, 300),
    "A10": (24, 125, 600),
    "L40S": (48, 362, 864),
    "A100 40GB": (40, 312, 1555),
    "A100 80GB": (80, 312, 2039),
    "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
}
#: shares of the data sheet's numbers that training reaches
_REACHED_GEMM, _REACHED_BANDWIDTH = 0.5, 0.7
_LAUNCH_SECONDS = 6e-6


def known_gpu(text: str) -> Gpu:
    """``"24GB"`` (memory alone) or a name such as ``"RTX 4090"``.

    Raises:
        InputError: neither.
    """
    plain = _plain(text)
    amount = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(gb|gib|g)", text.strip().lower())
    if amount is not None and float(amount[1]) > 0:
        return Gpu(f"a GPU of {amount[1]} GB", int(float(amount[1]) * 2**30))
    fitting = [name for name in KNOWN_GPUS if _plain(name) == plain]
    fitting = fitting or [n for n in KNOWN_GPUS if plain and _plain(n).startswith(plain)]
    if len(fitting) != 1:
        several = f" ({', '.join(fitting)} would fit)" if fitting else ""
        raise InputError(
            f"--gpu {text!r}: neither an amount of memory such as 24GB nor one known GPU{several}. "
            f"Known: {', '.join(KNOWN_GPUS)}"
        )
    name = fitting[0]
    memory, tera, giga = KNOWN_GPUS[name]
    return Gpu(name, int(memory * 2**30), _from_data_sheet(name, tera * 1e12, giga * 1e9))


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce", "", text.lower())


def _from_data_sheet(name: str, products: float, bandwidth: float) -> Rates:
    products, bandwidth = products * _REACHED_GEMM, bandwidth * _REACHED_BANDWIDTH
    return Rates(
        name=name,
        gemm={f"{r}x{w}": products * min(1.0, r / 1024) for r in ROWS for w in WIDTHS},
        # a thin product is bound by reading its input
        thin={str(rank): min(products, bandwidth * rank) for rank in RANKS},
        elementwise=bandwidth,
        softmax=bandwidth / 16,
        attention=products / 2,
        optimizer=bandwidth / 28,
        unpack=bandwidth / 4,
        fresh=bandwidth,
        overhead=_LAUNCH_SECONDS,
        measured=False,
    )
