"""What needs a GPU's memory and speed: 2^28 words through Box-Muller, more than 2^31 elements."""

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels import _native
from mezo_kernels.directions.cuda import ENVIRONMENT_VARIABLE
from mezo_kernels.directions.philox import MASK32

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

CHUNK = 1 << 22  # groups of four words


@pytest.fixture(autouse=True)
def _needs_cuda(native):
    if mk.backends()["cuda"] is not None:
        pytest.skip(mk.backends()["cuda"])


def int32_of(words: torch.Tensor) -> torch.Tensor:
    """uint32 values held in int64 as the same 32 bits."""
    return (words - (words >> 31 << 32)).to(torch.int32)


def assert_normals_equal(words: torch.Tensor) -> None:
    """[N, 4] int32 words on the GPU through the CUDA code, the same on the CPU."""
    module, n = _native.module(), len(words)
    ours = torch.empty(n, 4, device="cuda")
    stream = torch.cuda.current_stream()
    module.cuda_normals_of_words(
        ours.data_ptr(), words.data_ptr(), n, stream.device_index, stream.cuda_stream
    )
    on_host = words.cpu()
    theirs = torch.empty(n, 4)
    module.normals_of_words(theirs.data_ptr(), on_host.data_ptr(), n)
    assert torch.equal(ours.cpu().view(torch.int32), theirs.view(torch.int32))


def test_normals_of_words_spread_evenly(native):
    # Products with an odd number are a permutation of all words: 2^26 of them for the radius,
    # beginning at 0 and spread evenly, and as many for the angle.
    for start in range(0, 1 << 25, CHUNK):
        i = torch.arange(2 * start, 2 * (start + CHUNK), device="cuda").view(-1, 2)
        radius = i * 2654435761 & MASK32
        angle = (radius ^ radius >> 15) * 2246822519 + 12345 & MASK32
        words = torch.stack((radius[:, 0], angle[:, 0], radius[:, 1], angle[:, 1]), dim=1)
        assert_normals_equal(int32_of(words))


def test_normals_of_words_around_the_branches(native, edge_words):
    assert {0, MASK32} <= set(edge_words[:, 0].tolist())
    assert_normals_equal(int32_of(edge_words).cuda())


def test_normals_of_random_words(native):
    # 2^28 words with those above.
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range((1 << 25) // CHUNK):
        words = torch.randint(
            -(2**31), 2**31, (CHUNK, 4), generator=generator, device="cuda", dtype=torch.int64
        )
        assert_normals_equal(words.to(torch.int32))


@pytest.mark.parametrize(
    ("name", "lanes"), [("cuda", "wide"), ("cuda", "contiguous"), ("triton", "wide")]
)
def test_more_than_two_to_the_31_elements(native, bits, monkeypatch, name, lanes):
    # 8.6 GB of fp32 and twice 4.3 GB of bf16: past 2^31 in every index; only windows go to the CPU.
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, lanes)
    if mk.backends()[name] is not None:
        pytest.skip(mk.backends()[name])
    rows, cols = (1 << 20) + 3, 2056
    spec = mk.TensorSpec("huge", (rows, cols))
    master = torch.zeros(rows, cols, device="cuda")
    slots = [torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    plan = mk.AdapterPlan([master], [spec], [[slot] for slot in slots])
    now, before = mk.Direction(1, 2), mk.Direction(1, 1)
    mk.perturb_into(
        plan, directions=[now] * 2, scales=[0.5, -0.5], update=([before], [0.25]), backend=name
    )
    last = mk.Direction(1, 3, 0, "rademacher")
    mk.add_directions_(plan, directions=[last, now], coefficients=[1.0, 2.0], backend=name)
    edge = 2**31 // cols
    for row in (0, edge - 1, rows - 5):
        window = mk.TensorSpec("huge", (4, cols), row, 0, (rows, cols))
        own = torch.zeros(4, cols)
        own_slots = [torch.empty(4, cols, dtype=torch.bfloat16) for _ in range(2)]
        own_plan = mk.AdapterPlan([own], [window], [[slot] for slot in own_slots])
        mk.perturb_into(
            own_plan, directions=[now] * 2, scales=[0.5, -0.5], update=([before], [0.25])
        )
        mk.add_directions_(own_plan, directions=[last, now], coefficients=[1.0, 2.0])
        part = slice(row, row + 4)
        assert torch.equal(bits(master[part].cpu()), bits(own))
        for slot, own_slot in zip(slots, own_slots, strict=True):
            assert torch.equal(bits(slot[part].cpu()), bits(own_slot))
