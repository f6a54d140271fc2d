"""The random direction z: names, counter layout and the PyTorch reference of its bits.

csrc/philox.h holds the same definition for C++ and CUDA; the bits of both are equal, always.

Words: Philox4x32-10 (Salmon et al. 2011) with key = (seed low, seed high) and

* Gaussian: counter = (e >> 2, uid, step, 0 << 24 | index), word e & 3 belongs to element e;
* Rademacher: counter = (e >> 7, uid, step, 1 << 24 | index), bit e & 31 of word (e & 127) >> 5,
  0 -> +1 and 1 -> -1;

where e is the row-major index of the element in the whole (unsharded, unpadded) tensor.

Gaussian: Box-Muller on the word pairs (0, 1) and (2, 3); the first word gives the radius
r = sqrt(-2 log u), the second the angle, z_even = r cos, z_odd = r sin. Every operation is one
correctly rounded fp32 add, mul, fma, sqrt or int -> float conversion, in the order below::

    radius  u = (w + .5) 2^-32.  is_big = w >= BIG_WORD (u >= sqrt(.5));  x = is_big ? ~w : w
            v = fma(float(x), 2^-32, 2^-33)
            not big: u = v = 2^e (1 + f), 1 + f in [sqrt(.5), sqrt(2))
            big:     f = -v, e = 0, so a radius near 0 keeps its full relative precision
            y = f + fma(-.5, f^2, fma(f^3, P(f), e LN2_LO));   r = sqrt(-2 fma(e, LN2_HI, y))
    angle   q = (w + 2^29) >> 30 (mod 4);  t = float(int32(w << 2)) 2^-32 in [-.5, .5) quadrants
            s = fma(t, PIO2_HI, t fma(t^2, S(t^2), PIO2_LO));   c = fma(t^2, C(t^2), 1)
            (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c) for q = 0, 1, 2, 3

P, S and C are minimax polynomials in Horner form. A change of any constant or of any order of
operations changes z, and with it every stored trajectory: it is a format break.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from mezo_kernels.directions.fp32 import fma, sqrt

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF

DOMAINS = {"gaussian": 0, "rademacher": 1}
# log2 of the number of elements that one Philox call serves.
GROUP_SHIFT = {"gaussian": 2, "rademacher": 7}

SQRT_HALF_BITS = 0x3F3504F3
BIG_WORD = 0xB504F300
LN2_HI = float.fromhex("0x1.62e430p-1")
LN2_LO = float.fromhex("-0x1.05c610p-29")
LOG_P = tuple(
    map(
        float.fromhex,
        (
            "0x1.55551ep-2",
            "-0x1.0002b2p-2",
            "0x1.99b418p-3",
            "-0x1.545e62p-3",
            "0x1.219c8ap-3",
            "-0x1.0d2e2ep-3",
            "0x1.0be516p-3",
            "-0x1.482e4cp-4",
        ),
    )
)
PIO2_HI = float.fromhex("0x1.921fb6p+0")
PIO2_LO = float.fromhex("-0x1.777a5cp-25")
SIN_S = tuple(map(float.fromhex, ("-0x1.4abbbep-1", "0x1.465facp-4", "-0x1.2db5ccp-8")))
COS_C = tuple(
    map(float.fromhex, ("-0x1.3bd3ccp+0", "0x1.03c1b0p-2", "-0x1.55b2b4p-6", "0x1.d4f632p-11"))
)


@dataclass(frozen=True)
class Direction:
    """Name one random direction z; the same name gives the same bits everywhere.

    Args:
        seed: the run's seed, 0 .. 2**64 - 1; the Philox key.
        step: the training step, 0 .. 2**32 - 1.
        index: which direction of the step, 0 .. 2**24 - 1.
        distribution: "gaussian" (N(0, 1)) | "rademacher" (+1 or -1 with probability 1/2).

    Raises:
        ValueError: a value outside its range, or an unknown distribution.

    Example:
        >>> Direction(seed=7, step=0) == Direction(7, 0, index=0, distribution="gaussian")
        True
    """

    seed: int
    step: int
    index: int = 0
    distribution: str = "gaussian"

    def __post_init__(self) -> None:
        for field, bits in (("seed", 64), ("step", 32), ("index", 24)):
            value = getattr(self, field)
            if not isinstance(value, int) or not 0 <= value < 1 << bits:
                raise ValueError(
                    f"Direction: {field} must be an int in [0, 2**{bits}), got {value!r}; "
                    f"reduce it modulo 2**{bits}."
                )
        if self.distribution not in DOMAINS:
            raise ValueError(
                f"Direction: distribution must be one of {sorted(DOMAINS)}, "
                f"got {self.distribution!r}; pass one of these names."
            )

    @property
    def tail(self) -> int:
        """The last counter word, domain << 24 | index."""
        return DOMAINS[self.distribution] << 24 | self.index


@dataclass(frozen=True)
class TensorSpec:
    """Name a tensor, or a shard of one, by its place in the adapter as PEFT stores it.

    Args:
        name: canonical tensor name, e.g. `model.layers.3.self_attn.q_proj.lora_A`.
        shape: (rows, cols) of the tensor at hand, the shard.
        row0: first row of the shard in the whole tensor.
        col0: first column of the shard in the whole tensor.
        global_shape: (rows, cols) of the whole tensor; None means ``shape``, no sharding.

    Raises:
        ValueError: an empty name, a shape that is not 2-D, a shard that leaves the whole tensor,
            or a whole tensor of 2**34 elements or more.

    Example:
        >>> whole = TensorSpec("q_proj.lora_A", (2, 3))
        >>> last_row = TensorSpec("q_proj.lora_A", (1, 3), row0=1, global_shape=(2, 3))
        >>> whole.uid == last_row.uid
        True
    """

    name: str
    shape: tuple[int, int]
    row0: int = 0
    col0: int = 0
    global_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "TensorSpec: name must not be empty, got ''; pass the canonical tensor name."
            )
        object.__setattr__(self, "shape", self._checked_shape("shape", self.shape))
        whole = self.shape if self.global_shape is None else self.global_shape
        whole = self._checked_shape("global_shape", whole)
        object.__setattr__(self, "global_shape", whole)
        for axis, offset in enumerate((self.row0, self.col0)):
            if offset < 0 or offset + self.shape[axis] > whole[axis]:
                raise ValueError(
                    f"TensorSpec: {self.name} must lie inside its global_shape {whole}, got shape "
                    f"{self.shape} at row0={self.row0}, col0={self.col0}; "
                    "pass the shape of the whole tensor as global_shape."
                )
        if whole[0] * whole[1] >= 1 << 34:
            raise ValueError(
                f"TensorSpec: {self.name} must have fewer than 2**34 elements, got global_shape "
                f"{whole}; split it into tensors with names of their own."
            )

    def _checked_shape(self, field: str, shape: tuple[int, ...]) -> tuple[int, int]:
        sizes = tuple(int(size) for size in shape)
        if len(sizes) != 2 or min(sizes) < 0:
            raise ValueError(
                f"TensorSpec: {field} of {self.name} must be (rows, cols), got {sizes}; "
                "flatten the leading dimensions."
            )
        return sizes[0], sizes[1]

    @property
    def whole_shape(self) -> tuple[int, int]:
        """`global_shape`, which is never None once the spec exists."""
        assert self.global_shape is not None
        return self.global_shape

    @cached_property
    def uid(self) -> int:
        """The counter's second word, the first 4 bytes (little endian) of blake2s of the name."""
        return int.from_bytes(hashlib.blake2s(self.name.encode()).digest()[:4], "little")


def philox4x32(counter: torch.Tensor, key: torch.Tensor, *, rounds: int = 10) -> torch.Tensor:
    """Return the words of Philox4x32, the counter-based generator behind every direction.

        words = Philox4x32-rounds(counter, key)

    Args:
        counter: `[N, 4]` int64, uint32 values.
        key: `[2]` or `[N, 2]` int64, uint32 values, on the counter's device.
        rounds: number of rounds; every direction in this package uses 10.

    Returns:
        `[N, 4]` int64 holding uint32 words; the caller owns it.

    Raises:
        ValueError: wrong shape or dtype, or a negative number of rounds.

    Numerics: integers only; equal to Random123. Graph-safe: no. Cost: about 20 int64 passes a
    round: the reference for tests, not a fast path.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1, 4, dtype=torch.int64)
        >>> [f"{word:08x}" for word in philox4x32(zeros, zeros[0, :2])[0]]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    if counter.dim() != 2 or counter.shape[1] != 4 or counter.dtype != torch.int64:
        raise ValueError(
            "philox4x32: counter must be int64 of shape [N, 4], got "
            f"{counter.dtype} of shape {tuple(counter.shape)}; stack the four words in dim 1."
        )
    if key.shape not in {(2,), (counter.shape[0], 2)} or key.dtype != torch.int64:
        raise ValueError(
            f"philox4x32: key must be int64 of shape [2] or [{counter.shape[0]}, 2], got "
            f"{key.dtype} of shape {tuple(key.shape)}; pass (seed low word, seed high word)."
        )
    if rounds < 0:
        raise ValueError(f"philox4x32: rounds must be >= 0, got {rounds}; pass 10.")
    c0, c1, c2, c3 = counter.unbind(1)
    key0, key1 = key.unbind(-1)
    for _ in range(rounds):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        product0, product1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK32) ^ c1 ^ key0,
            product1 & MASK32,
            (product0 >> 32 & MASK32) ^ c3 ^ key1,
            product0 & MASK32,
        )
        key0, key1 = key0 + W0 & MASK32, key1 + W1 & MASK32
    return torch.stack((c0, c1, c2, c3), dim=1)


def normals_of_words(words: torch.Tensor) -> torch.Tensor:
    """Return the exact Gaussians of `[N, 4]` uint32 words (held in int64) as `[N, 4]` fp32."""
    r = _radius(words[:, 0::2])
    cos, sin = _cos_sin(words[:, 1::2])
    return torch.stack((r * cos, r * sin), dim=2).reshape(-1, 4)


def _horner(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = fma(value, x, coefficient)
    return value


def _radius(words: torch.Tensor) -> torch.Tensor:
    is_big = words >= BIG_WORD
    # uint32 -> float64 is exact, so the second conversion is the only rounding.
    x = torch.where(is_big, words ^ MASK32, words).to(torch.float64).to(torch.float32)
    v = fma(x, 2.0**-32, 2.0**-33)
    shifted = v.view(torch.int32) - SQRT_HALF_BITS
    mantissa = ((shifted & 0x007FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    e = torch.where(is_big, 0, shifted >> 23).to(torch.float32)
    f = torch.where(is_big, -v, mantissa - 1.0)
    f2 = f * f
    y = fma(f2 * f, _horner(LOG_P, f), e * LN2_LO)
    y = f + fma(-0.5, f2, y)
    return sqrt(-2.0 * fma(e, LN2_HI, y))


def _cos_sin(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quadrant = (words + (1 << 29)) >> 30
    signed = ((words << 2) & MASK32).to(torch.int32)
    t = signed.to(torch.float32) * 2.0**-32
    t2 = t * t
    s = fma(t, PIO2_HI, t * fma(t2, _horner(SIN_S, t2), PIO2_LO))
    c = fma(t2, _horner(COS_C, t2), 1.0)
    is_swapped = quadrant & 1 == 1
    cos, sin = torch.where(is_swapped, s, c), torch.where(is_swapped, c, s)
    cos = torch.where((quadrant + 1) & 2 != 0, -cos, cos)
    return cos, torch.where(quadrant & 2 != 0, -sin, sin)


def direction_of_elements(elements: torch.Tensor, uid: int, direction: Direction) -> torch.Tensor:
    """Return z (fp32) of element indices `[R, C]` int64, consecutive along each row."""
    if elements.numel() == 0:
        return torch.empty(elements.shape, dtype=torch.float32, device=elements.device)
    shift = GROUP_SHIFT[direction.distribution]
    first = elements[:, :1] >> shift
    num_groups = int(((elements[:, -1:] >> shift) - first).max()) + 1
    groups = first + torch.arange(num_groups, device=elements.device)
    counter = torch.empty((groups.numel(), 4), dtype=torch.int64, device=elements.device)
    # A row that needs fewer groups may run past the last one, 2**32 - 1; those words are not used.
    counter[:, 0] = groups.reshape(-1) & MASK32
    counter[:, 1], counter[:, 2], counter[:, 3] = uid, direction.step, direction.tail
    key = torch.tensor(
        [direction.seed & MASK32, direction.seed >> 32], dtype=torch.int64, device=elements.device
    )
    words = philox4x32(counter, key)
    if direction.distribution == "gaussian":
        z = normals_of_words(words)
    else:
        bits = words.unsqueeze(2) >> torch.arange(32, device=elements.device) & 1
        z = (1 - 2 * bits).to(torch.float32)
    return z.reshape(len(elements), -1).gather(1, elements - (first << shift))
