"""The exact Gaussian: same bits on every path, close to float64 Box-Muller, and normal."""

import numpy as np
import pytest
import scipy.stats
import torch

import mezo_kernels as mk
from mezo_kernels.directions.philox import normals_of_words

MAX_ABS, MAX_ULP = 1e-6, 4.0
MILLION = 1 << 20


def random_words(groups: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2**32, (groups, 4), generator=torch.Generator().manual_seed(seed))


def reference(words: torch.Tensor) -> np.ndarray:
    """Float64 Box-Muller: u = (w + .5) / 2^32, angle = 2 pi w / 2^32."""
    w = words.numpy()
    radius_words, angle_words = w[:, 0::2], w[:, 1::2]
    u = (radius_words + 0.5) / 2.0**32
    # 1 - u is exact, so log1p keeps the small radii.
    log_u = np.where(u > 0.5, np.log1p(-((2**32 - 1 - radius_words) + 0.5) / 2.0**32), np.log(u))
    radius = np.sqrt(-2.0 * log_u)
    # Reduced to [-pi/4, pi/4) in integers, where sin and cos lose nothing.
    quadrant = (angle_words + 2**29) >> 30
    angle = (angle_words - (quadrant << 30)) * (np.pi / 2.0**31)
    cos, sin = np.cos(angle), np.sin(angle)
    quadrant = quadrant & 3
    z0 = radius * np.choose(quadrant, [cos, -sin, -cos, sin])
    z1 = radius * np.choose(quadrant, [sin, cos, -sin, -cos])
    return np.stack((z0, z1), axis=2).reshape(-1, 4)


def worst_errors(z: torch.Tensor, words: torch.Tensor) -> tuple[float, float]:
    expected = reference(words)
    error = np.abs(z.numpy().astype(np.float64) - expected)
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    return float(error.max()), float((error / ulp).max())


def test_native_bits_equal_the_reference_at_the_edges(isa, native_normals, edge_words, bits):
    assert torch.equal(bits(native_normals(edge_words)), bits(normals_of_words(edge_words)))


@pytest.fixture(scope="module")
def two_million():
    """Random words and the reference's normals of them."""
    words = random_words(MILLION // 2, 1)
    return words, normals_of_words(words)


def test_native_bits_equal_the_reference_on_random_words(isa, native_normals, bits, two_million):
    words, expected = two_million
    assert torch.equal(bits(native_normals(words)), bits(expected))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17])
def test_native_tails(isa, native_normals, bits, count):
    words = random_words(count, count)
    assert torch.equal(bits(native_normals(words)), bits(normals_of_words(words)))


def test_the_extreme_words_give_finite_values():
    z = normals_of_words(torch.tensor([[0, 0, 2**32 - 1, 0], [0, 2**30, 2**32 - 1, 2**31]]))
    assert torch.isfinite(z).all()
    # sqrt(-2 log(2^-33)) and sqrt(-2 log(1 - 2^-33)).
    assert z[0].tolist() == pytest.approx([6.7637, 0.0, 1.5259e-05, 0.0], rel=1e-4)
    assert z[1, 1].item() == pytest.approx(6.7637, rel=1e-4)
    assert z[1, 2].item() == pytest.approx(-1.5259e-05, rel=1e-4)


def test_accuracy_at_the_edges(edge_words):
    worst_abs, worst_ulp = worst_errors(normals_of_words(edge_words), edge_words)
    assert worst_abs <= MAX_ABS
    assert worst_ulp <= MAX_ULP


@pytest.mark.parametrize("part", ["all", "threshold", "small radius", "large radius"])
def test_accuracy_on_random_words(native_normals, part):
    words = random_words(3 * MILLION if part == "all" else MILLION // 2, 2)
    if part == "threshold":
        words[:, 0::2] = 0xB504F300 + (words[:, 0::2] >> 12) - 2**19
    elif part == "small radius":
        words[:, 0::2] = 2**32 - 1 - (words[:, 0::2] >> 8)
    elif part == "large radius":
        words[:, 0::2] >>= 8
    worst_abs, worst_ulp = worst_errors(native_normals(words), words)
    assert worst_abs <= MAX_ABS
    assert worst_ulp <= MAX_ULP


@pytest.fixture(scope="module")
def many():
    """16 M normals of one tensor, as float64."""
    spec = mk.TensorSpec("moments", (4096, 4096))
    return mk.sample(spec, mk.Direction(2024, 5)).reshape(-1).to(torch.float64)


def test_moments_are_those_of_a_normal(many):
    n = many.numel()
    assert n >= 10**7
    # Variances of the sample moments of N(0, 1): of z 1, z^2 2, z^3 15, z^4 96.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = (many**power).mean().item()
        assert abs(moment - expected) <= 5 * (variance / n) ** 0.5, power


def test_distribution_is_normal(many):
    # One fixed sample: the p-value is a constant, and a wrong tail or scale gives about 0.
    assert scipy.stats.kstest(many[:4_000_000].numpy(), "norm").pvalue > 1e-3
    tail = (many.abs() > 4).double().mean().item()
    expected = 2 * scipy.stats.norm.sf(4)
    assert abs(tail - expected) <= 5 * (expected / many.numel()) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 128, 4096])
def test_neighbours_are_uncorrelated(many, lag):
    n = many.numel() - lag
    # Standard error of the correlation of independent values: 1 / sqrt(n).
    assert abs((many[:-lag] * many[lag:]).mean().item()) <= 5 / n**0.5
    squares = many**2 - 1
    assert abs((squares[:-lag] * squares[lag:]).mean().item()) <= 5 * 2 / n**0.5


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_streams_are_uncorrelated(distribution):
    n = MILLION
    shape = (1024, 1024)
    base = mk.sample(mk.TensorSpec("a", shape), mk.Direction(3, 4, 5, distribution))
    others = {
        "seed": mk.sample(mk.TensorSpec("a", shape), mk.Direction(4, 4, 5, distribution)),
        "seed high": mk.sample(
            mk.TensorSpec("a", shape), mk.Direction(3 + 2**32, 4, 5, distribution)
        ),
        "step": mk.sample(mk.TensorSpec("a", shape), mk.Direction(3, 5, 5, distribution)),
        "index": mk.sample(mk.TensorSpec("a", shape), mk.Direction(3, 4, 6, distribution)),
        "tensor": mk.sample(mk.TensorSpec("b", shape), mk.Direction(3, 4, 5, distribution)),
    }
    for what, other in others.items():
        assert abs((base * other).double().mean().item()) <= 5 / n**0.5, what
