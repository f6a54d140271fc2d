"""What README and pages say a user can do, done as it stands there."""

from __future__ import annotations

import ast
import random
import re
import shlex
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import mezo
from mezo.tasks import assets
from tests.support.files import run_script
from tests.support.independent import load_peft
from tests.support.source import ROOT
from tests.support.tiny import load_model, random_batch

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    """The commands of indented blocks, without their remarks."""
    lines = re.findall(
        r"^    (\S.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_name_what_is_there(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mezo":
                assert hasattr(mezo, node.attr), f"mezo.{node.attr}"


@pytest.mark.slow
def test_own_data_in_three_commands(tiny_model_dir, tmp_path):
    train, evaluate, generate = [
        line for line in shell_lines(README) if line.startswith("mezo ") and "runs/mine" in line
    ]
    words = [f"w{5 + i % 50} w{9 + i % 40},{('bad', 'good')[i % 2]}" for i in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *words]))
    small = f"--model {tiny_model_dir('llama')} --max_steps 2 --engine transformers"
    for line in (f"{train} {small}", f"{evaluate} --max_eval_samples 8", generate):
        command = [sys.executable, "-m", "mezo", *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert (tmp_path / "runs" / "mine" / "eval_results.json").exists()


@pytest.mark.sglang
@pytest.mark.slow
def test_the_quickstart_runs_on_the_real_model(tmp_path):
    (block,) = python_blocks(README)
    assert '"path/to/model"' in block
    script = tmp_path / "quickstart.py"
    shown = "        print(result.step, result.status.name, result.loss)\n"
    block = block.replace('"path/to/model"', repr(str(assets.model_dir())))
    block = re.sub(r"(        result = mezo.step.*\n)", lambda m: m.group(1) + shown, block)
    script.write_text(block)
    steps = re.findall(r"^(\d+) OK [\d.]+$", run_script(script, cwd=script.parent), re.MULTILINE)
    assert steps == [str(i) for i in range(10)]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.sglang
@pytest.mark.slow
def test_the_serving_block_runs(tiny_model_dir, tmp_path):
    _, block = python_blocks(ROOT / "docs" / "sglang.md")
    directory = tiny_model_dir("llama")
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=[77, 8],
    )
    get_peft_model(load_model(directory), lora).save_pretrained(str(tmp_path / "alora"))
    block = block.replace('"path/to/model"', repr(directory))
    block = block.replace('"path/to/alora_adapter"', repr(str(tmp_path / "alora")))
    block = block.replace("prompt_with_the_invocation", '"w5 w6 w7 w77 w8 w9"')
    lines = [*block.splitlines(), "print(output['meta_info']['cached_tokens'])"]
    lines.append("engine.shutdown()")
    script = tmp_path / "serving.py"
    body = "".join(f"    {line}\n" for line in lines)
    script.write_text(f'import mezo\n\nif __name__ == "__main__":\n{body}')
    # The tokens before the invocation.
    assert run_script(script, cwd=script.parent).splitlines()[-1] == "3"


@pytest.mark.sglang
@pytest.mark.slow
def test_finetune_from_a_path_starts_and_ends_an_engine(tiny_model_dir, tmp_path, no_engine_noise):
    directory = tiny_model_dir("llama")
    config = mezo.MeZOConfig(rank=2, target_modules=("q_proj", "o_proj"), lr=1e-3)
    batch = random_batch(random.Random(0))
    summary = mezo.finetune(
        directory, repeat(batch), num_steps=4, config=config, held_out=[batch], output=tmp_path
    )
    assert summary.steps == 4
    assert summary.after.loss != summary.before.loss
    load_peft(directory, tmp_path)
