"""Actions and placements as data."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron.core.pipeline.actions as actions_module
from megatron.core.pipeline import Action, ActionKind, Placement

PURE = ("actions", "schedules", "simulation", "lowering", "validation", "drawing")
actions = st.builds(Action, st.sampled_from(ActionKind), st.integers(0, 999), st.integers(0, 9999))


@given(actions)
def test_the_text_form_reads_back_as_the_same_action(action):
    assert Action.parse(str(action)) == action


def test_the_text_form_is_stage_kind_microbatch():
    assert str(Action(ActionKind.F, 3, 0)) == "3F0"
    assert Action.parse("10SEND_B2") == Action(ActionKind.SEND_B, 10, 2)


@pytest.mark.parametrize("text", ["", "F0", "3F", "3X0", "3F0 ", "-1F0", "3f0", "3SEND0"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError):
        Action.parse(text)


@given(actions.filter(lambda action: action.kind.is_communication))
def test_the_counterpart_of_the_counterpart_is_the_action_itself(action):
    other = action.counterpart
    assert other.counterpart == action
    assert other.kind.is_send != action.kind.is_send
    assert abs(other.stage - action.stage) == 1 and other.microbatch == action.microbatch


@given(actions.filter(lambda action: action.kind.is_communication))
def test_both_ends_of_a_message_carry_the_value_of_the_sending_stage(action):
    send = action if action.kind.is_send else action.counterpart
    assert action.carries == action.counterpart.carries
    assert action.carries == (send.kind == "SEND_B", send.stage, send.microbatch)


@given(actions.filter(lambda action: not action.kind.is_communication))
def test_a_computation_has_no_counterpart(action):
    with pytest.raises(ValueError, match="is a computation"):
        _ = action.counterpart


def test_the_loop_placement_goes_round_the_ranks_once_per_chunk():
    placement = Placement.loop(num_ranks=3, num_chunks=2)
    assert placement.stage_ranks == (0, 1, 2, 0, 1, 2)
    assert (placement.num_stages, placement.num_ranks, placement.num_chunks) == (6, 3, 2)
    assert placement.stages_of(1) == (1, 4)


@pytest.mark.parametrize("name", PURE)
def test_schedules_are_data_and_import_no_torch(name):
    tree = ast.parse(Path(actions_module.__file__).with_name(f"{name}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name for node in imports for alias in node.names
    }
    assert not any(module.split(".")[0] == "torch" for module in modules)
