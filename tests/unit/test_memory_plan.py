"""What is read from the compiler's plan of a chip's memory."""

from pathlib import Path

from launcher.training.compile_check import Compilation, Plan

PLAN = """BufferAssignment:
allocation 0: size 4000, parameter 0, shape |f32[1000]| at ShapeIndex {}, output shape is |f32[1000]| at ShapeIndex {}:
 value: <1 param @0> (size=4000,offset=0): f32[1000]{0:T(1024)}
allocation 1: size 512, maybe-live-out:
allocation 2: size 24, output shape is |(f32[1000], f32[])|, maybe-live-out:
allocation 3: size 512, constant:
allocation 4: size 512, thread-local:
allocation 5: size 9000, preallocated-temp:
 value: <7 fusion @0> (size=9000,offset=0): f32[2250]{0:T(1024)}
allocation 6: size 70000, color 1, preallocated-temp:
"""


def test_a_chips_memory_is_weighed_by_kind_and_its_other_memories_are_not(tmp_path: Path) -> None:
    (tmp_path / "module_0.jit_train.after_optimizations-buffer-assignment.txt").write_text(PLAN)
    done = Compilation(None, 1.0)
    Plan(tmp_path).weigh(done)
    assert (done.arguments_bytes, done.outputs_bytes, done.temporaries_bytes) == (4000, 536, 10_024)
    assert done.total_bytes == 14_560


def test_a_plan_is_there_when_its_program_is_written_to_the_end(tmp_path: Path) -> None:
    plan, path = Plan(tmp_path), tmp_path / "module_0.jit_train.after_optimizations_after_buffer_assignment.txt"
    assert not plan.is_there
    path.write_text("HloModule jit_train\n\nENTRY %main {\n  ROOT %x = f32[] constant(1)\n")
    assert not plan.is_there
    path.write_text(path.read_text() + "}\n")
    assert plan.is_there


def test_without_a_plan_nothing_is_weighed(tmp_path: Path) -> None:
    done = Compilation(None, 1.0)
    Plan(tmp_path).weigh(done)
    assert done.total_bytes is None
