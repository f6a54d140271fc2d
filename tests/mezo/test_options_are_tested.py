"""Every option has a test that changes it and sees its effect; here stands which one."""

from __future__ import annotations

import ast
from functools import cache

import pytest
import typer

from mezo.cli import app
from mezo.settings import fields
from tests.support.source import ROOT

TRAIN = "mezo/train/"
OWN, LOOP = TRAIN + "test_own_data.py::", TRAIN + "test_loop_options.py::"
DATA, MODEL = TRAIN + "test_data_options.py::", TRAIN + "test_model_options.py::"
TRACKERS, VERBS = TRAIN + "test_trackers.py::", TRAIN + "test_verb_options.py::"
RESUME = TRAIN + "test_resume.py::"
SAVED, SEAMS = TRAIN + "test_saved_run.py::", "mezo/test_seams.py::"
DOCTOR, PLOT = "mezo/diagnostics/test_doctor.py::", TRAIN + "test_run_plots.py::"

# A setting of `mezo train`, YAML and Python by its field's name: the test.
SETTINGS = {
    # MeZOConfig
    "rank": LOOP + "test_the_rank",
    "alpha": LOOP + "test_alpha_scales_what_the_adapter_adds",
    "target_modules": LOOP + "test_the_modules_that_are_trained",
    "lr": LOOP + "test_the_learning_rate",
    "eps": LOOP + "test_eps_is_how_far_the_losses_lie_apart",
    "seed": LOOP + "test_the_seed_is_of_directions_and_of_the_order",
    "num_directions": LOOP + "test_the_number_of_directions",
    "distribution": LOOP + "test_the_distribution_of_directions",
    "clip": LOOP + "test_the_bound_on_projected_grads",
    "prefix": TRAIN + "test_evaluation.py::test_prefixes_of_own_data",
    "invocation": LOOP + "test_the_invocation_stands_before_the_options",
    "name": "engines/sglang/test_conversation.py::"
    "test_two_runs_in_two_threads_and_evaluations_in_a_third",
    "estimator": SEAMS + "test_an_estimator",
    "optimizer": SEAMS + "test_an_optimizer",
    # TrainConfig: model and engine
    "output": LOOP + "test_the_output_is_where_everything_is",
    "model": MODEL + "test_a_model_by_its_name_or_directory",
    "model_revision": MODEL + "test_a_revision_is_the_one_that_every_verb_loads",
    "dtype": OWN + "test_a_dtype_reaches_the_engine",
    "trust_remote_code": MODEL + "test_a_model_s_own_code_runs_only_where_it_is_trusted",
    "engine": SEAMS + "test_a_format_a_task_and_an_engine",
    "threads": MODEL + "test_threads_are_those_of_the_engine",
    "max_tokens_per_forward": OWN
    + "test_a_bound_on_a_forward_s_tokens_changes_nothing_but_their_number",
    "engine_args": OWN + "test_the_engine_gets_its_own_arguments_and_room_for_the_prompts",
    # Data
    "task": SEAMS + "test_a_format_a_task_and_an_engine",
    "data": OWN + "test_bad_rows_are_counted_and_skipped",
    "dataset_config": DATA + "test_a_configuration_and_a_revision_reach_the_hub",
    "dataset_revision": DATA + "test_a_configuration_and_a_revision_reach_the_hub",
    "train_split": DATA + "test_splits_are_files_of_a_folder",
    "test_split": DATA + "test_splits_are_files_of_a_folder",
    "eval_data": DATA + "test_splits_are_files_of_a_folder",
    "streaming": OWN + "test_the_file_s_own_order_and_a_stream_are_one",
    "columns": DATA + "test_columns_name_what_is_read",
    "template": DATA + "test_a_template_words_the_rows",
    "on_bad_row": OWN + "test_bad_rows_are_counted_and_skipped",
    "k_shot": OWN + "test_few_shots_and_fewer_examples",
    "train_examples": OWN + "test_few_shots_and_fewer_examples",
    "max_prompt_tokens": OWN + "test_lengths",
    "max_length": OWN + "test_lengths",
    "shuffle": OWN + "test_the_file_s_own_order_and_a_stream_are_one",
    "completion_only_loss": DATA + "test_the_loss_of_prompts_and_of_assistants",
    "assistant_only_loss": DATA + "test_the_loss_of_prompts_and_of_assistants",
    "chat_template_path": DATA + "test_a_chat_template_words_chats",
    # The loop
    "num_steps": OWN + "test_evaluations_by_epoch_and_checkpoints",
    "num_epochs": OWN + "test_epochs_and_accumulation",
    "batch_size": LOOP + "test_the_batch_size",
    "accumulation": OWN + "test_epochs_and_accumulation",
    "schedule": OWN + "test_warmup_and_schedule",
    "warmup_steps": OWN + "test_warmup_and_schedule",
    "warmup_ratio": OWN + "test_warmup_and_schedule",
    # Evaluation and saving
    "metric": LOOP + "test_the_metric_is_computed_beside_the_loss",
    "eval_examples": OWN + "test_few_shots_and_fewer_examples",
    "eval_batch_size": LOOP + "test_the_size_of_an_evaluation_s_batches",
    "eval_every": OWN + "test_the_best_adapter_is_saved_in_the_end",
    "eval_strategy": OWN + "test_evaluations_by_epoch_and_checkpoints",
    "save_every": OWN + "test_evaluations_by_epoch_and_checkpoints",
    "save_strategy": LOOP + "test_checkpoints_by_epoch",
    "save_total_limit": OWN + "test_evaluations_by_epoch_and_checkpoints",
    "load_best": OWN + "test_the_best_adapter_is_saved_in_the_end",
    "best_metric": OWN + "test_a_greater_metric_is_better",
    "greater_is_better": LOOP + "test_what_is_better_may_be_said",
    "patience": OWN + "test_waiting_for_a_better_one_ends",
    # Reporting
    "logging_steps": LOOP + "test_lines_of_progress",
    "report_to": TRACKERS + "test_tensorboard_gets_steps_and_evaluations",
    "run_name": TRACKERS + "test_a_tracker_sees_the_run_s_name_and_schedule",
    "resume_from_checkpoint": RESUME + "test_auto_begins_goes_on_and_is_done",
    "at": RESUME + "test_a_branch_from_an_earlier_step",
    "allow_change": RESUME + "test_a_branch_from_an_earlier_step",
    "overwrite_output_dir": RESUME + "test_an_output_with_a_training_is_not_overwritten",
    "max_skipped_steps": RESUME
    + "test_too_many_skipped_steps_end_a_training_and_an_earlier_step_saves_it",
    "push_to_hub": LOOP + "test_an_upload_goes_where_it_should",
    "hub_model_id": LOOP + "test_an_upload_goes_where_it_should",
}
_FILE_AND_SET = (
    "mezo/cli/test_options.py::test_the_command_line_wins_over_the_file_and_set_over_both"
)
_PRINTED = SAVED + "test_the_verb_prints_answers"
_ENGINE_AND_MODEL = VERBS + "test_another_engine_and_another_place_of_the_model"
_OTHERS = TRAIN + "test_evaluation.py::test_other_rows_are_worded_as_the_training_s"
_SCORED = VERBS + "test_which_examples_are_scored"
_EXPORTED = VERBS + "test_an_export_s_format_and_model"
_PLOTTED = PLOT + "test_the_verb_writes_a_file_or_says_why_not"

# {verb: {option: the test}}; of train what is no setting.
VERB_OPTIONS = {
    "train": {"config": _FILE_AND_SET, "set_": _FILE_AND_SET},
    "eval": {
        "data": _OTHERS,
        "split": _SCORED,
        "metric": _OTHERS,
        "max_examples": _SCORED,
        "max_new_tokens": VERBS + "test_how_long_generated_completions_are",
        "engine": _ENGINE_AND_MODEL,
        "model": _ENGINE_AND_MODEL,
        "threads": MODEL + "test_threads_are_those_of_the_engine",
    },
    "generate": {
        "prompt": _PRINTED,
        "file": _PRINTED,
        "max_new_tokens": VERBS + "test_how_long_generated_completions_are",
        "temperature": _PRINTED,
        "stop": _PRINTED,
        "base": _PRINTED,
        "engine": _ENGINE_AND_MODEL,
        "model": _ENGINE_AND_MODEL,
        "threads": MODEL + "test_threads_are_those_of_the_engine",
    },
    "export": dict.fromkeys(("output", "format", "model"), _EXPORTED),
    "plot": {"output": _PLOTTED},
    "replay": dict.fromkeys(("at", "backend", "output"), RESUME + "test_replay_and_verify"),
    "verify": {"model": RESUME + "test_replay_and_verify"},
    "doctor": {
        "model": DOCTOR + "test_a_sound_model_on_transformers",
        "engine": DOCTOR + "test_a_sound_model_on_transformers",
        "target_modules": DOCTOR + "test_layers_that_cannot_be_trained_give_1",
    },
}


@cache
def functions_in(path):
    """{name: text, with its decorators} of the functions of a file of tests."""
    text = (ROOT / "tests" / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def options_of(command):
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help"]


def test_every_setting_stands_here():
    assert set(SETTINGS) == {field.name for _, field in fields().values()}


def test_every_option_of_every_verb_stands_here():
    commands = typer.main.get_command(app).commands
    found = {verb: {p.name for p in options_of(command)} for verb, command in commands.items()}
    found["train"] -= set(SETTINGS)
    assert {verb: set(tests) for verb, tests in VERB_OPTIONS.items()} == found


def check(test, names):
    """The test is there, and one of the option's names stands in it."""
    path, _, function = test.partition("::")
    text = functions_in(path)[function].replace("-", "_")
    assert any(name.strip("-").replace("-", "_") in text for name in names), (test, names)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_s_test_is_there_and_names_it(name):
    field = fields()[name][1]
    check(SETTINGS[name], (*field.metadata["names"], name))


@pytest.mark.parametrize("verb", VERB_OPTIONS)
def test_a_verb_s_tests_are_there_and_name_its_options(verb):
    command = typer.main.get_command(app).commands[verb]
    for parameter in options_of(command):
        name = parameter.name
        if name in VERB_OPTIONS[verb]:
            check(VERB_OPTIONS[verb][name], (*parameter.opts, name))
