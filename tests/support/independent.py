"""Independent paths to the numbers our engines return: PEFT, and Algorithm 1 in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mezo
from mezo.core.init import initial_values
from mezo_kernels import Direction, TensorSpec, add_directions_, sample
from tests.support.tiny import load_model


def peft_model(model_dir: str, config: mezo.MeZOConfig):
    """A PEFT LoRA model with our theta_0."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_model(model_dir), lora).eval()
    for name, parameter in lora_parameters(model).items():
        parameter.data.copy_(initial_values(TensorSpec(name, tuple(parameter.shape)), config.seed))
    return model


def lora_parameters(model) -> dict[str, torch.nn.Parameter]:
    """{canonical name: parameter} of a PEFT model."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def save_random_adapter(model_dir: str, config: mezo.MeZOConfig, directory) -> str:
    """Save an adapter of random weights as PEFT saves one; returns its directory."""
    model = peft_model(model_dir, config)
    generator = torch.Generator().manual_seed(8)
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(str(directory))
    return str(directory)


def load_peft(model_dir: str, adapter_dir) -> PeftModel:
    return PeftModel.from_pretrained(load_model(model_dir), str(adapter_dir)).eval()


def row_logprobs(model, row: Sequence[int], prompt_len: int) -> torch.Tensor:
    """Log-likelihoods of the tokens behind the prompt; one row, no padding."""
    logits = model(torch.tensor([list(row)])).logits[0].log_softmax(-1)
    positions = torch.arange(prompt_len - 1, len(row) - 1)
    return logits[positions, torch.tensor(list(row[prompt_len:]))]


def reference_loss(model, batch: mezo.Batch) -> torch.Tensor:
    """The loss of a batch of token ids from the paper's definitions; differentiable."""
    pairs = batch.pairs()
    scores = [row_logprobs(model, [*p, *c], len(p)) for p, c in pairs]
    if batch.options is None:
        return -torch.cat(scores).mean()
    means, losses = [s.mean() for s in scores], []
    for size, label in zip(batch.num_options(), batch.labels, strict=True):
        losses.append(-torch.stack(means[:size]).log_softmax(0)[label])
        means = means[size:]
    return torch.stack(losses).mean()


@torch.no_grad()
def algorithm_1(model, batch, *, seed, step, eps, lr):
    """MeZO's Algorithm 1: perturb in place, forward, perturb, forward, restore, update."""
    parameters = lora_parameters(model)

    def perturb(scale: float) -> None:
        for name, parameter in parameters.items():
            z = sample(TensorSpec(name, tuple(parameter.shape)), Direction(seed, step))
            parameter.data.add_(z, alpha=scale)

    perturb(eps)
    loss_plus = reference_loss(model, batch).item()
    perturb(-2 * eps)
    loss_minus = reference_loss(model, batch).item()
    perturb(eps)
    projected_grad = (loss_plus - loss_minus) / (2 * eps)
    perturb(-lr * projected_grad)
    return loss_plus, loss_minus, projected_grad


def check_against_algorithm_1(run: mezo.Run, model_dir: str, batches) -> None:
    """Step a fresh run and the paper's loop side by side: equal losses, equal update."""
    config = run.config
    model = peft_model(model_dir, config)
    before = run.weights()
    for batch in batches:
        result = run.step(batch)
        plus, minus, grad = algorithm_1(
            model, batch, seed=config.seed, step=result.step, eps=config.eps, lr=config.lr
        )
        assert result.loss_plus == pytest.approx(plus, abs=1e-5)
        assert result.loss_minus == pytest.approx(minus, abs=1e-5)
        check_projected_grad(result.projected_grads[0], grad)
    after, theirs = run.weights(), lora_parameters(model)
    update = {name: after[name] - before[name] for name in after}
    expected = {name: theirs[name].detach() - before[name] for name in after}
    # In-place restoring leaves the paper's loop an ulp of theta off after every step.
    assert relative_distance(update, expected) < 2e-3


def step_both(run: mezo.Run, reference: mezo.Run, batch):
    """Take a step of two runs of fp32; returns both results, whose losses agree to rounding."""
    ours, theirs = run.step(batch), reference.step(batch)
    assert ours.loss_plus == pytest.approx(theirs.loss_plus, abs=1e-5)
    assert ours.loss_minus == pytest.approx(theirs.loss_minus, abs=1e-5)
    return ours, theirs


def check_projected_grad(ours: float, theirs: float) -> None:
    """1e-3 relative at eps 1e-2.

    Losses near 10 come with an error of some fp32 ulp (1e-6); divided by 2 eps that leaves about
    1e-4 in the projected gradient, which counts where the gradient itself is small.
    """
    assert ours == pytest.approx(theirs, rel=1e-3, abs=3e-4)


def check_replay(results, trained: dict[str, torch.Tensor], seed: int) -> None:
    """theta_0 and the coefficients give the trained weights bit for bit, in one pass."""
    specs = [TensorSpec(name, tuple(value.shape)) for name, value in trained.items()]
    tensors = [initial_values(spec, seed) for spec in specs]
    directions = [Direction(seed, result.step) for result in results]
    add_directions_(tensors, specs, directions, [c for r in results for c in r.coefficients])
    for spec, tensor in zip(specs, tensors, strict=True):
        assert torch.equal(tensor.view(torch.int32), trained[spec.name].view(torch.int32))


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all tensors, in float64."""
    assert a.keys() == b.keys()
    difference = math.fsum((a[k].double() - b[k].double()).square().sum().item() for k in b)
    return math.sqrt(difference / math.fsum(b[k].double().square().sum().item() for k in b))


@torch.no_grad()
def activated_row_logprobs(base, adapted, prompt, rest, scored: int) -> torch.Tensor:
    """Log-likelihoods of the last ``scored`` tokens: prompt on the base model, rest adapted.

    The base model computes keys and values of the prompt; a PEFT model continues from them.
    """
    cache = None
    if prompt:
        cache = base(torch.tensor([list(prompt)]), use_cache=True).past_key_values
    ids = torch.tensor([list(rest)])
    logits = adapted(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
    positions = torch.arange(len(rest) - scored - 1, len(rest) - 1)
    return logits.log_softmax(-1)[positions, ids[0, -scored:]]


def activated_loss(base, adapted, batch: mezo.Batch, invocation: Sequence[int]) -> float:
    """The loss of a batch of token ids under an activated adapter, from the definitions."""
    scores = [
        activated_row_logprobs(base, adapted, p, [*invocation, *c], len(c))
        for p, c in batch.pairs()
    ]
    if batch.options is None:
        return -torch.cat(scores).mean().item()
    means, losses = [s.mean() for s in scores], []
    for size, label in zip(batch.num_options(), batch.labels, strict=True):
        losses.append(-torch.stack(means[:size]).log_softmax(0)[label])
        means = means[size:]
    return torch.stack(losses).mean().item()


def set_lora(model, weights: dict[str, torch.Tensor]) -> None:
    """Give a PEFT model these LoRA weights."""
    for name, parameter in lora_parameters(model).items():
        parameter.data.copy_(weights[name])


def perturbed(weights: dict[str, torch.Tensor], direction, scale: float) -> dict[str, torch.Tensor]:
    """theta + scale z in float64, rounded once."""
    return {
        name: (
            value.double()
            + scale * sample(TensorSpec(name, tuple(value.shape)), direction).double()
        ).float()
        for name, value in weights.items()
    }


def activated_pair(model_dir: str, config: mezo.MeZOConfig):
    """A function (weights, step, batch) -> loss_plus, loss_minus of an activated adapter."""
    base, adapted = load_model(model_dir), peft_model(model_dir, config)

    def losses(weights, step, batch):
        values = []
        for scale in (config.eps, -config.eps):
            set_lora(adapted, perturbed(weights, Direction(config.seed, step), scale))
            values.append(activated_loss(base, adapted, batch, config.invocation))
        return values

    return losses


def check_activated_step(run: mezo.Run, pair, batch) -> mezo.StepResult:
    """One step equals the independent computation, ``pair``."""
    weights = run.weights()
    result = run.step(batch)
    plus, minus = pair(weights, result.step, batch)
    assert result.loss_plus == pytest.approx(plus, abs=1e-5)
    assert result.loss_minus == pytest.approx(minus, abs=1e-5)
    check_projected_grad(result.projected_grads[0], (plus - minus) / (2 * run.config.eps))
    return result
