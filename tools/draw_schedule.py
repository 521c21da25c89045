"""Draw a pipeline schedule: what each rank does when, its bubble, and how many activations it holds.

    python tools/draw_schedule.py --schedule 1f1b --pipeline_model_parallel_size 4 --num_microbatches 8

It draws the very objects that training executes, after proving that they cannot deadlock.
"""

from __future__ import annotations

import math
from pathlib import Path

from megatron.cli import ArgumentParser, run_main
from megatron.core.pipeline import (
    SCHEDULE_NAMES,
    ActionKind,
    Costs,
    Schedule,
    StageCosts,
    build_schedule,
    draw,
    lower,
    simulate,
    validate,
)
from megatron.core.pipeline.drawing import action_label
from megatron.errors import ConfigError


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    schedule = build_schedule(
        args.schedule, args.pipeline_model_parallel_size, args.num_microbatches, num_chunks=args.num_model_chunks
    )
    num_stages = schedule.placement.num_stages
    forward = _time_per_stage("--forward_time", args.forward_time or [1.0], num_stages)
    backward = _time_per_stage("--backward_time", args.backward_time or [2.0], num_stages)
    if not 0 <= args.communication_time < math.inf:
        raise ConfigError(f"--communication_time {args.communication_time:g} is not a time; give 0 or more.")
    stages = tuple(StageCosts(f, b / 2, b / 2) for f, b in zip(forward, backward, strict=True))
    costs = Costs(stages, args.communication_time)

    validate(schedule)
    if args.format == "text":
        print(draw(schedule, costs))
    elif args.format == "program":
        for pipeline_rank, actions in enumerate(lower(schedule).ranks):
            print(f"rank {pipeline_rank}:", *actions)
    else:
        _draw_png(schedule, costs, args.output)
        print(f"wrote {args.output}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--schedule", "--pipeline_schedule", choices=SCHEDULE_NAMES, default="1f1b", help="as in training"
    )
    parser.add_argument("--pipeline_model_parallel_size", type=int, required=True, help="ranks in the pipeline")
    parser.add_argument("--num_microbatches", type=int, required=True, help="micro-batches per step")
    parser.add_argument("--num_model_chunks", type=int, default=1, help="stages per rank, for interleaved")
    parser.add_argument(
        "--forward_time", type=float, nargs="+", metavar="TIME", help="of a stage; one, or one per stage; default: 1"
    )
    parser.add_argument("--backward_time", type=float, nargs="+", metavar="TIME", help="likewise, backward; default: 2")
    parser.add_argument("--communication_time", type=float, default=0.0, metavar="TIME", help="from rank to rank")
    parser.add_argument("--format", choices=("text", "program", "png"), default="text", help="chart, actions, or image")
    parser.add_argument("--output", type=Path, default=Path("schedule.png"), help="file that --format png writes")
    return parser


def _time_per_stage(flag: str, times: list[float], num_stages: int) -> list[float]:
    for time in times:
        if not 0 < time < math.inf:
            raise ConfigError(f"{flag} {time:g} is not a time that a stage can take; give a positive number.")
    if len(times) == 1:
        return times * num_stages
    if len(times) != num_stages:
        raise ConfigError(
            f"{flag} has {len(times)} times, and there are {num_stages} stages; give one time, or one per stage."
        )
    return times


def _draw_png(schedule: Schedule, costs: Costs, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and the text formats do without

    timeline = simulate(schedule, costs)
    placement = schedule.placement
    figure = Figure(figsize=(16, 1.5 + 0.5 * placement.num_ranks), layout="constrained")
    axes = figure.add_subplot()
    longest = max(span.end - span.start for spans in timeline.spans for span in spans)
    show_labels = timeline.makespan / longest < 60  # more boxes than that leave no room for text
    for pipeline_rank, spans in enumerate(timeline.spans):
        stages = placement.stages_of(pipeline_rank)
        for action, start, end in spans:
            hue = "tab:blue" if action.kind is ActionKind.F else "tab:green"
            shade = 0.9 - 0.6 * stages.index(action.stage) / len(stages)  # later chunks are paler
            box = (start, end - start)
            axes.broken_barh(
                [box], (pipeline_rank - 0.4, 0.8), facecolor=(hue, shade), edgecolor="black", linewidth=0.5
            )
            if show_labels:
                axes.text(
                    (start + end) / 2, pipeline_rank, action_label(action, placement), ha="center", va="center", size=7
                )
    axes.set_yticks(
        range(placement.num_ranks), [f"rank {rank}, peak {live:g}" for rank, live in enumerate(timeline.peak_live)]
    )
    axes.invert_yaxis()
    axes.set_xlabel("time")
    axes.set_title(f"{schedule.name}: bubble {timeline.bubble_fraction:.1%} of the time")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}; name another file.") from error


if __name__ == "__main__":
    run_main(main)
