"""Lines that people and programs read: exact columns, all digits, and one history over several runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.errors import ConfigError, TrainingError
from megatron.training.metrics import EvaluationMetrics, StepMetrics
from megatron.training.sinks import ConsoleSink, JsonLinesSink, MetricsLog, TensorBoardSink, read_metrics, to_json
from small_run import small_run

STEP = StepMetrics(
    iteration=20,
    lm_loss=0.1 + 0.2,
    learning_rate=3e-4,
    grad_norm=0.81234567,
    consumed_samples=320,
    valid_tokens=2000,
    step_time_s=1.2345,
    tokens_per_s=49_400.0,
    tflops_per_gpu=412.34,
    memory_gib=61.234,
    eta_s=3723.4,
)
VALIDATION = EvaluationMetrics("validation", 20, 2.5, 12.182493960703473, 12000)


def step(iteration: int, lm_loss: float) -> StepMetrics:
    return replace(STEP, iteration=iteration, lm_loss=lm_loss)


def validation(iteration: int, lm_loss: float) -> EvaluationMetrics:
    return replace(VALIDATION, iteration=iteration, lm_loss=lm_loss)


def console(*, is_gpu: bool) -> ConsoleSink:
    return ConsoleSink(train_iters=1000, world_size=4, is_gpu=is_gpu, time_of_day=lambda: "03:00:01")


def test_the_console_line_of_a_gpu_has_speeds_per_gpu(capsys):
    console(is_gpu=True).step(STEP)
    assert capsys.readouterr().out == (
        "03:00:01 | iteration    20/1000 | lm loss  0.300000 | lr 3.000e-04 | grad norm    0.8123 | 1.234 s/step | "
        "12.35 ktok/s/gpu | 412.3 TFLOP/s/gpu |  61.23 GiB | ETA 01:02:03\n"
    )


def test_the_console_line_of_the_cpu_has_speeds_of_the_whole_job(capsys):
    console(is_gpu=False).step(replace(STEP, tflops_per_gpu=0.005, eta_s=None))
    assert capsys.readouterr().out == (
        "03:00:01 | iteration    20/1000 | lm loss  0.300000 | lr 3.000e-04 | grad norm    0.8123 | 1.234 s/step | "
        "  49400 tok/s | 20.00 GFLOP/s |  61.23 GiB | ETA --:--:--\n"
    )


def test_a_bert_has_a_second_loss_beside_the_first(capsys, tmp_path):
    sink = console(is_gpu=True)
    sink.step(replace(STEP, sentence_loss=0.6931))
    sink.evaluation(replace(VALIDATION, sentence_loss=0.5))
    step_line, evaluation_line = capsys.readouterr().out.splitlines()
    assert "| lm loss  0.300000 | sentence loss  0.693100 | lr 3.000e-04 |" in step_line
    assert "| lm loss  2.500000 | sentence loss  0.500000 | perplexity 12.1825 |" in evaluation_line
    file = JsonLinesSink(tmp_path / "metrics.jsonl")
    file.step(replace(STEP, sentence_loss=float("nan")))
    file.evaluation(replace(VALIDATION, sentence_loss=0.5))
    file.step(replace(STEP, iteration=21))
    file.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["sentence_loss"], first["validation_sentence_loss"]) == (None, 0.5)
    assert "sentence_loss" not in second


@pytest.mark.parametrize("is_gpu", [False, True])
def test_columns_stay_where_they_are_from_tiny_to_huge_figures(capsys, is_gpu):
    tiny = replace(
        STEP, iteration=1, grad_norm=1.2345e-7, step_time_s=0.00123, tokens_per_s=3.2, memory_gib=0.3, eta_s=0.0
    )
    huge = replace(
        STEP, iteration=999, lm_loss=12.5, grad_norm=123456.7, step_time_s=86400.0, tokens_per_s=9.1e6,
        tflops_per_gpu=999.96, memory_gib=188.0, eta_s=4e6,
    )  # fmt: skip
    for metrics in (tiny, huge, replace(huge, eta_s=None)):
        console(is_gpu=is_gpu).step(replace(metrics, tflops_per_gpu=metrics.tflops_per_gpu * (1 if is_gpu else 1e-3)))
    lines = capsys.readouterr().out.splitlines()
    columns = [[i for i, character in enumerate(line) if character == "|"] for line in lines]
    assert columns[0] == columns[1] == columns[2]


@pytest.mark.parametrize(
    ("eta_s", "shown"), [(59.6, "00:01:00"), (359_999, "99:59:59"), (360_000, "  4d 04h"), (4e6, " 46d 07h")]
)
def test_an_eta_is_eight_characters_long(capsys, eta_s, shown):
    console(is_gpu=True).step(replace(STEP, eta_s=eta_s))
    assert capsys.readouterr().out.endswith(f"| ETA {shown}\n")


def test_an_evaluation_lines_up_with_the_steps(capsys):
    console(is_gpu=True).evaluation(VALIDATION)
    console(is_gpu=True).evaluation(replace(VALIDATION, name="test"))
    assert capsys.readouterr().out == (
        "03:00:01 | validation   20/1000 | lm loss  2.500000 | perplexity 12.1825 | 12000 tokens\n"
        "03:00:01 | test         20/1000 | lm loss  2.500000 | perplexity 12.1825 | 12000 tokens\n"
    )


def test_a_json_line_has_every_figure_with_all_its_digits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.step(STEP)
    sink.evaluation(VALIDATION)
    assert path.read_text() == (  # before it is closed: a reader sees each line at once
        '{"iteration": 20, "lm_loss": 0.30000000000000004, "learning_rate": 0.0003, "grad_norm": 0.81234567, '
        '"consumed_samples": 320, "valid_tokens": 2000, "step_time_s": 1.2345, "tokens_per_s": 49400.0, '
        '"tflops_per_gpu": 412.34, "memory_gib": 61.234, "eta_s": 3723.4}\n'
        '{"iteration": 20, "validation_loss": 2.5, "validation_perplexity": 12.182493960703473, '
        '"validation_tokens": 12000}\n'
    )
    sink.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(value):
    assert (
        to_json({"iteration": 1, "validation_perplexity": value}) == '{"iteration": 1, "validation_perplexity": null}'
    )


def test_a_resumed_run_appends_and_the_history_is_what_it_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    killed = JsonLinesSink(path)
    for iteration in (1, 2, 3, 4):
        killed.step(step(iteration, 10.0 - iteration))
        if iteration in (2, 4):
            killed.evaluation(validation(iteration, 20.0 - iteration))
    killed.close()
    resumed = JsonLinesSink(path)  # from the checkpoint of iteration 2
    resumed.step(step(3, 0.5))
    resumed.close()
    assert len(path.read_text().splitlines()) == 7
    history = read_metrics(path)
    assert [line["iteration"] for line in history] == [1, 2, 3]
    assert [line["lm_loss"] for line in history] == [9.0, 8.0, 0.5]
    assert [line.get("validation_loss") for line in history] == [None, 18.0, None]


def test_an_evaluation_right_after_resuming_voids_what_came_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    for iteration in (1, 2, 3):
        sink.step(step(iteration, 1.0))
    sink.evaluation(validation(2, 1.5))
    sink.close()
    assert [(line["iteration"], line["lm_loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 1.0)]


def test_a_line_that_a_crash_cut_off_is_not_read_and_not_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "lm_loss": 3.0}\n{"iteration": 2, "lm_lo')
    assert read_metrics(path) == [{"iteration": 1, "lm_loss": 3.0}]
    sink = JsonLinesSink(path)
    sink.step(step(2, 2.0))
    sink.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_metrics_file_that_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(ConfigError) as refused:
        JsonLinesSink(path)
    assert str(refused.value) == f"{path} cannot be written (Is a directory); choose another folder for --save."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands in for a full disk")
def test_a_full_disk_ends_the_run_with_a_reason(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.close()
    sink._file = Path("/dev/full").open("a")  # noqa: SIM115  (closing it would raise as well)
    with pytest.raises(TrainingError) as full:
        sink.step(STEP)
    assert str(full.value) == (
        f"{path} cannot be written (No space left on device); free some space and resume from the last checkpoint."
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_history_of_the_last_run(tmp_path):
    killed = TensorBoardSink(str(tmp_path), first_iteration=1)
    for iteration in (1, 2, 3):
        killed.step(step(iteration, float(iteration)))
    killed.evaluation(validation(2, 2.5))
    killed.close()
    resumed = TensorBoardSink(str(tmp_path), first_iteration=3)
    resumed.step(step(3, 0.5))
    resumed.close()
    shown = scalars(tmp_path)
    assert shown["train/lm_loss"] == [(1, 1.0), (2, 2.0), (3, 0.5)]
    assert shown["validation/lm_loss"] == [(2, 2.5)]
    assert set(shown) >= {"train/learning_rate", "train/grad_norm", "train/tokens_per_s", "validation/perplexity"}


def test_a_tensorboard_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refused:
        TensorBoardSink(f"{tmp_path}/file", first_iteration=1)
    assert str(refused.value) == (
        f"--tensorboard_dir {tmp_path}/file cannot be written (File exists); choose another folder."
    )


def test_the_main_process_writes_everything_and_the_others_nothing(tmp_path, capsys):
    for is_main, name in ((False, "other"), (True, "main")):
        (tmp_path / name).mkdir()
        run = small_run(2, save=f"{tmp_path}/{name}", tensorboard_dir=f"{tmp_path}/{name}/tensorboard")
        log = MetricsLog(run, device=torch.device("cpu"), is_main=is_main)
        log.message(f"{name} starts")
        log.step(STEP)
        log.evaluation(VALIDATION)
        log.close()
    assert list((tmp_path / "other").iterdir()) == []
    assert [line["lm_loss"] for line in read_metrics(tmp_path / "main" / "metrics.jsonl")] == [STEP.lm_loss]
    assert scalars(tmp_path / "main" / "tensorboard")["train/lm_loss"]
    printed = capsys.readouterr().out.splitlines()
    assert (printed[0], len(printed)) == ("main starts", 3)


def test_a_run_that_keeps_nothing_still_prints(capsys):
    log = MetricsLog(small_run(), device=torch.device("cpu"), is_main=True)
    log.step(STEP)
    log.close()
    assert "lm loss  0.300000" in capsys.readouterr().out
