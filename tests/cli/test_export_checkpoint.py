"""`mindalle export-checkpoint`: its arguments; tests/training/test_export.py has what it makes."""

import pytest
from commands import message


@pytest.mark.parametrize("step", ["newest", "-1", "1.5", ""])
def test_a_step_is_a_word_or_a_number(mindalle_cli, tmp_path, step):
    code, _, err = mindalle_cli("export-checkpoint", tmp_path, tmp_path / "out", f"--step={step}")
    assert code == 2
    assert message(err, "export-checkpoint") == f"--step must be last, best or the number of a step, not {step!r}"


def test_a_folder_that_is_no_run(mindalle_cli, tmp_path):
    code, _, err = mindalle_cli("export-checkpoint", tmp_path, tmp_path / "out")
    assert code == 2 and message(err, "export-checkpoint") == f"{tmp_path}: is no run of training; it has no run.yaml"
