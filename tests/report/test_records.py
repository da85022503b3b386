"""Records: what is read from a run, and the commands that make it again."""

import shlex
from pathlib import Path

import pytest

from scribbleseg.errors import InputError
from scribbleseg.evaluate import evaluate
from scribbleseg.predict import Predictor
from scribbleseg.report.records import commands, find, read_record, validation_part


def test_findings_are_those_of_the_best_checkpoint(make_run, predictor: Predictor, root: Path):
    record = read_record(make_run("run").path)
    found = find(record, None, None, count=1)
    expected = evaluate(predictor, root, "train", None, fold=0)
    assert found.evaluation.rows == expected.rows
    assert found.evaluation.settings["checkpoint"] == record.uri
    assert len(found.evaluation.rows) == 4
    assert found.num_parameters == sum(each.numel() for each in predictor.model.parameters())


def test_remote_data_are_looked_for_where_the_run_kept_them(make_run, bucket_data, tmp_path):
    record = read_record(make_run("run").path)
    kept = tmp_path / "kept"
    record.info["config"]["data"] |= {"root": bucket_data, "cache_dir": str(kept)}
    # The tiny data are other images than the run's; their number is enough here.
    find(record, None, None, count=1)
    assert [path for path in kept.rglob("*.png")]


def test_validation_part_is_a_fold_or_a_split(make_run):
    run = make_run("run")
    record = read_record(run.path)
    assert validation_part(record)[1:] == ("train", 0)
    record.info["config"]["data"] |= {"fold": None, "val_split": "val"}
    assert validation_part(record)[1:] == ("val", None)
    record.info["config"]["data"] |= {"val_split": None}
    with pytest.raises(InputError, match="not validated"):
        validation_part(record)
    assert [line.split()[1] for line in commands(record)] == ["-m", "report"]


def test_commands_can_be_pasted_into_a_shell(make_run, root: Path):
    run = make_run("it's mine")
    assert [shlex.split(line) for line in commands(read_record(run.path))] == [
        ["python", "-m", "train.finetune", "it's mine.yaml"],
        ["scribbleseg", "evaluate", "--checkpoint", run.path, "--data", str(root)]
        + ["--split", "train", "--fold", "0"],
        ["scribbleseg", "report", run.path],
    ]
