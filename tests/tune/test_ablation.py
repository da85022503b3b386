"""The ablation: its plan, its figures against plain arithmetic, and a whole one on tiny data."""

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scribbleseg.checkpoint import read_model, write_model
from scribbleseg.cli import exit_status
from scribbleseg.config import FinetuneConfig, ModelConfig, PretrainConfig
from scribbleseg.errors import InputError
from scribbleseg.evaluate import Row
from scribbleseg.manifest import write_manifest
from scribbleseg.models import build_model
from scribbleseg.runs import RunFolder
from train.recipes import PRETRAIN_RECIPES, RECIPES
from tune.ablation import (
    JOBS,
    AblationJob,
    main,
    mean_history,
    plan,
    read_encoders,
    read_practised,
    settle,
)
from tune.comparison import METRICS, Cell, figures, score, to_csv, to_tables

TINY = [
    "--finetune.data.long-side=64", "--finetune.data.crop-size=64", "--finetune.model.width=8",
    "--finetune.model.depth=3", "--finetune.model.norm=group", "--finetune.train.batch-size=4",
    "--finetune.train.epochs=1", "--finetune.train.precision=fp32", "--finetune.data.num-workers=0",
    "--pretrain.crops.global-size=64", "--pretrain.crops.local-size=32",
    "--pretrain.crops.num-local=2", "--pretrain.dino.out-dim=32", "--pretrain.dino.hidden-dim=32",
    "--pretrain.train.batch-size=4", "--pretrain.train.epochs=1", "--pretrain.train.precision=fp32",
    "--pretrain.data.num-workers=0", "--launch.cpus-per-worker=1",
]  # fmt: skip


def make_job(tiny_data, **changes):
    base = JOBS["demo"]()
    return settle(AblationJob(**{**vars(base), "data_root": str(tiny_data), **changes}), base)


def make_rows(generator, count):
    values = generator.uniform(0.2, 1.0, (count, 3))
    return [
        Row(stem=f"{n}", object_iou=o, background_iou=b, miou=m, boundary_iou=0.0, object_share=0.5)
        for n, (o, b, m) in enumerate(values.tolist())
    ]


def test_recipes_of_finetuning_and_pretraining_come_in_pairs():
    alone = {"practice", "best", "scratch"}
    assert JOBS.keys() == PRETRAIN_RECIPES.keys() == RECIPES.keys() - alone
    assert JOBS["report"]().finetune == RECIPES["report"]()
    assert JOBS["report"]().pretrain == PRETRAIN_RECIPES["report"]()


def test_encoders_come_first_and_are_shared(tiny_data):
    runs = plan(make_job(tiny_data, seeds=2), "/runs/a", {}, {})
    names = [run.name for run in runs]
    assert names[:2] == ["pretrain-unet-s0", "pretrain-resunet-s0"]
    assert names[2:8] == [
        f"{architecture}-{start}-s0-share1.0"
        for architecture in ("unet", "resunet", "attention_resunet")
        for start in ("scratch", "dino")
    ]
    assert len(names) == len(set(names)) == 2 + 3 * 2 * 2
    by_name = {run.name: run.config for run in runs}
    assert by_name["unet-scratch-s1-share1.0"].init_from is None
    for architecture, encoder in (("unet", "unet"), ("attention_resunet", "resunet")):
        config = by_name[f"{architecture}-dino-s1-share1.0"]
        assert config.init_from == f"/runs/a/pretrain-{encoder}-s0"
        assert (config.model.architecture, config.train.seed) == (architecture, 1)
    assert by_name["pretrain-unet-s0"].data.roots == (str(tiny_data),)


def test_shares_and_pretraining_seeds_multiply_the_plan(tiny_data):
    job = make_job(
        tiny_data, seeds=3, pretrain_seeds=2, shares=(0.25, 1.0), architectures=("resunet",)
    )
    configs = {run.name: run.config for run in plan(job, "/a", {}, {})}
    assert len(configs) == 2 + 3 * 2 * 2
    assert configs["pretrain-resunet-s1"].train.seed == 1
    ends = [configs[f"resunet-dino-s{seed}-share0.25"].init_from[-2:] for seed in range(3)]
    assert ends == ["s0", "s1", "s0"]
    assert configs["resunet-scratch-s2-share0.25"].data.share == 0.25


def test_folds_are_held_out_in_turn_by_runs_of_their_own(tiny_data):
    job = make_job(tiny_data, seeds=2, folds=(2, 0), architectures=("unet",))
    configs = {run.name: run.config for run in plan(job, "/a", {}, {})}
    assert list(configs)[:3] == [
        "pretrain-unet-s0",
        "unet-scratch-s0-share1.0-fold2",
        "unet-dino-s0-share1.0-fold2",
    ]
    assert len(configs) == 1 + 2 * 2 * 2
    assert configs["unet-scratch-s1-share1.0-fold0"].data.fold == 0
    assert configs["unet-scratch-s1-share1.0-fold2"].data.fold == 2
    # One encoder serves all folds, and a fold that is not asked for names no run.
    assert {each.init_from for each in configs.values() if isinstance(each, FinetuneConfig)} == {
        None,
        "/a/pretrain-unet-s0",
    }
    job = make_job(tiny_data, architectures=("unet",))
    assert plan(job, "/a", {}, {})[1].config.data.fold == 0


def save(folder, config):
    model = build_model(config.model)
    part = model.encoder if isinstance(config, PretrainConfig) else model
    write_model(folder, config=config, weights=part.state_dict(), metrics={})
    write_manifest(folder)
    return str(folder)


def test_given_encoders_are_not_pretrained_again(tiny_data, tmp_path):
    resunet = save(
        tmp_path / "r", PretrainConfig(model=ModelConfig(architecture="resunet", depth=5))
    )
    job = make_job(tiny_data, pretrained=(resunet,))
    configs = {run.name: run.config for run in plan(job, "/a", read_encoders(job), {})}
    assert [name for name in configs if name.startswith("pretrain")] == ["pretrain-unet-s0"]
    starts = [configs[f"{each}-dino-s0-share1.0"].init_from for each in job.architectures]
    assert starts == ["/a/pretrain-unet-s0", resunet, resunet]
    assert configs["resunet-scratch-s0-share1.0"].init_from is None


def test_encoders_that_fit_nothing_are_refused_by_name(tiny_data, tmp_path):
    model = JOBS["demo"]().finetune.model
    wide = save(tmp_path / "wide", PretrainConfig(model=replace(model, width=24)))
    whole = save(tmp_path / "whole", FinetuneConfig(model=model))
    right = save(tmp_path / "right", PretrainConfig(model=model))
    for given, message in (
        ((wide,), "wide holds an encoder of"),
        ((whole,), "is a segmentation network; expected a run of `train.pretrain`"),
        ((right, right), "are both of"),
        ((str(tmp_path / "none"),), "none"),
    ):
        with pytest.raises(InputError, match=message):
            read_encoders(make_job(tiny_data, pretrained=given))


def test_scratch_and_dino_differ_in_their_start_alone(tiny_data):
    configs = {run.name: run.config for run in plan(make_job(tiny_data), "/a", {}, {})}
    one, other = (vars(configs[f"unet-{start}-s0-share1.0"]) for start in ("scratch", "dino"))
    assert {key for key in one if one[key] != other[key]} == {"init_from"}


def test_networks_that_practised_are_a_start_of_their_own(tiny_data, tmp_path):
    models = [
        replace(JOBS["demo"]().finetune.model, architecture=each) for each in ("resunet", "unet")
    ]
    practised = [
        save(tmp_path / model.architecture, FinetuneConfig(model=model)) for model in models
    ]
    job = make_job(
        tiny_data, architectures=("unet", "resunet"), practised=tuple(practised), dino=False
    )
    runs = plan(job, "/a", read_encoders(job), read_practised(job))
    starts = {run.name: run.config.init_from for run in runs if run.config.train.seed == 0}
    assert starts == {
        "unet-scratch-s0-share1.0": None,
        "unet-practice-s0-share1.0": practised[1],
        "resunet-scratch-s0-share1.0": None,
        "resunet-practice-s0-share1.0": practised[0],
    }
    assert [run.cell.start for run in runs[:2]] == ["scratch", "practice"]
    assert runs[0].cost == runs[1].cost
    both = replace(job, dino=True)
    names = [run.name for run in plan(both, "/a", {}, read_practised(both))]
    assert names[:2] == ["pretrain-unet-s0", "pretrain-resunet-s0"]
    assert names[2:5] == [f"unet-{each}-s0-share1.0" for each in ("scratch", "dino", "practice")]


def test_networks_that_practised_and_fit_nothing_are_refused_by_name(tiny_data, tmp_path):
    model = JOBS["demo"]().finetune.model
    right = save(tmp_path / "right", FinetuneConfig(model=model))
    for given, message in (
        ((save(tmp_path / "eyes", PretrainConfig(model=model)),), "eyes is an encoder; expected"),
        (
            (save(tmp_path / "wide", FinetuneConfig(model=replace(model, width=24))),),
            "wide holds a network of .*width=24",
        ),
        ((right, right), "are both of unet"),
        ((right,), "no network of resunet, attention_resunet; expected one of each"),
        ((str(tmp_path / "none"),), "none"),
    ):
        with pytest.raises(InputError, match=message):
            read_practised(make_job(tiny_data, practised=given))


def test_figures_agree_with_plain_arithmetic():
    generator = np.random.default_rng(3)
    cells = [
        Cell(start, architecture, share)
        for architecture in ("unet", "resunet")
        for share in (0.5, 1.0)
        for start in ("scratch", "DINO", "practice")
    ]
    scores = {cell: [make_rows(generator, 20) for _ in range(3)] for cell in cells}
    found = figures(scores)
    assert len(found) == (len(cells) + 2 * len(cells) // 3) * 3
    by_key = {figure[:4]: figure for figure in found}
    for cell in cells:
        for metric in METRICS:
            means = [statistics.mean(getattr(r, metric) for r in rows) for rows in scores[cell]]
            figure = by_key[(*cell, metric)]
            assert figure.mean == pytest.approx(statistics.mean(means))
            assert figure.deviation == pytest.approx(statistics.stdev(means))
    scratch = scores[Cell("scratch", "resunet", 0.5)]
    for start in ("DINO", "practice"):
        gains = []
        for image in range(20):
            before = statistics.mean(seed[image].miou for seed in scratch)
            after = statistics.mean(
                seed[image].miou for seed in scores[Cell(start, "resunet", 0.5)]
            )
            gains.append(after - before)
        figure = by_key[(f"{start}-scratch", "resunet", 0.5, "miou")]
        assert figure.mean == pytest.approx(statistics.mean(gains))
        # Another way to draw the resamples gives nearly the same interval.
        draws = np.random.default_rng(8).choice(gains, (20_000, 20)).mean(axis=1)
        ends = np.percentile(draws, [2.5, 97.5])
        assert (figure.low, figure.high) == pytest.approx(ends, abs=5e-3)


def test_tables_stand_in_the_reports_form():
    generator = np.random.default_rng(0)
    scores = {Cell(s, "unet", 0.25): [make_rows(generator, 5)] * 2 for s in ("scratch", "DINO")}
    scratch, dino, difference = to_tables(figures(scores), "a note")
    assert scratch.header == ["Table 1: from scratch", "Labels", "Object IoU", "Background IoU",
                              "mIoU"]  # fmt: skip
    assert scratch.rows[0][:2] == ["unet", "25 %"] and scratch.rows[0][2].endswith("± 0.000")
    assert dino.header[0] == "Table 2: DINO" and difference.note == "a note"
    assert difference.rows[0][4][0] in "+−" and " to " in difference.rows[0][4]
    lines = list(csv.DictReader(to_csv(figures(scores)).splitlines()))
    assert len(lines) == 9 and lines[0]["table"] == "scratch" and lines[0]["low"] == ""


def test_one_seed_has_no_deviation():
    rows = make_rows(np.random.default_rng(0), 4)
    scores = {Cell(start, "unet", 1.0): [rows] for start in ("scratch", "DINO")}
    assert "±" not in figures(scores)[0].text()
    assert figures(scores)[-1].text() == "+0.000 (+0.000 to +0.000)"


def test_histories_are_averaged_epoch_by_epoch():
    histories = [
        # The first was trained with more workers.
        [{"epoch": 1, "all_reduce": 0.1, "miou": 0.2}, {"epoch": 2}],
        [{"epoch": 1, "miou": 0.4}, {"epoch": 2}],
    ]
    assert mean_history(histories) == [{"epoch": 1, "miou": pytest.approx(0.3)}, {"epoch": 2}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "data.root is not set; expected the folder"),
        (["cup"], "'cup' is unknown; expected demo, cpu, report, gpu"),
        (["--data.root", "/nowhere"], "/nowhere"),
        (["cpu", "--architectures", "unet", "vgg"], "'vgg'"),
        (["cpu", "--architectures", "unet", "unet"], "none of them twice"),
        (["cpu", "--architectures"], "architectures is ()"),
        (["--data.root", "x", "--no-dino"], "dino is False and practised is ()"),
        (
            "--data.root x --no-dino --pretrained eyes --practised p".split(),
            "dino is False, but pretrained is ('eyes',)",
        ),
        (["cpu", "--seeds", "0"], "seeds is 0"),
        (["cpu", "--seeds", "2", "--pretrain-seeds", "3"], "pretrain_seeds is 3"),
        (["cpu", "--shares", "0.5", "1.5"], "shares is 1.5"),
        (["cpu", "--shares", "0"], "shares is 0.0"),
        (["cpu", "--finetune.train.seed", "3"], "finetune.train.seed is set by the ablation"),
        (["cpu", "--pretrain.model.width", "8"], "expected --finetune.model"),
        (["--data.root", "x", "--finetune.data.fold", "None"], "expected images to compare on"),
        (["cpu", "--folds", "0", "5"], "folds is 5; expected 0 to 4"),
        (["cpu", "--folds", "1", "1"], "folds is (1, 1); expected none of them twice"),
        (
            "--data.root x --folds 1 --finetune.data.fold None --finetune.data.val-split v".split(),
            "expected one of the two",
        ),
        (["cpu", "--finetune.train.epochs", "0"], "train.epochs is 0"),
    ],
)
def test_bad_command_lines_are_one_line_and_status_2(arguments, words, capsys):
    assert exit_status(lambda: main(arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_seeds_folds_are_scored_each_on_its_own_images_and_pooled(tiny_data, tmp_path):
    model = ModelConfig(width=8, depth=3, norm="group")
    encoder = save(tmp_path / "eyes", PretrainConfig(model=model))
    practised = save(tmp_path / "practised", FinetuneConfig(model=model))
    main(["demo", f"--data-root={tiny_data}", f"--storage={tmp_path}", "--name=a", "--seeds=1",
          "--architectures=unet", *TINY, "--folds", "0", "1",
          f"--pretrained={encoder}", f"--practised={practised}"])  # fmt: skip
    folder = tmp_path / "a"
    rows = []
    for fold in (0, 1):
        uri = f"{folder}/unet-scratch-s0-share1.0-fold{fold}"
        config = read_model(Path(uri) / "checkpoint_0001").config
        assert config.data.fold == fold
        rows += score(uri, config)
    assert len({row.stem for row in rows}) == len(rows)
    lines = list(csv.DictReader((folder / "tables.csv").read_text().splitlines()))
    [shown] = [each for each in lines if each["table"] == "scratch" and each["metric"] == "miou"]
    assert float(shown["mean"]) == pytest.approx(statistics.mean(row.miou for row in rows))
    text = (folder / "tables.md").read_text()
    assert f"{len(rows)} images of train, folds 0, 1, held out in turn" in text
    assert "Table 5: practice − scratch" in text and f"Practice: {practised}." in text
    config = read_model(folder / "unet-practice-s0-share1.0-fold1" / "checkpoint_0001").config
    assert config.init_from == practised


def test_images_that_are_not_there_are_named(tiny_data):
    with pytest.raises(InputError, match="/nowhere"):
        main(["demo", f"--data.root={tiny_data}", "--images", "/nowhere"])


def test_a_folder_or_record_of_something_else_is_one_line(tiny_data, tmp_path):
    words = ["demo", f"--data.root={tiny_data}", f"--storage={tmp_path}"]
    for name, record, message in (
        ("a", "sweep.json", "holds sweep.json of something else"),
        ("b", "ablation.json", "lists no runs; restore it"),
    ):
        RunFolder.at(str(tmp_path), name).write_json(record, {"a": 1})
        with pytest.raises(InputError, match=message):
            main([*words, f"--name={name}"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written .*--storage"):
        main([*words, f"--storage={tmp_path}/file"])


def test_one_that_trained_nothing_keeps_no_name(tiny_data, tmp_path, monkeypatch):
    command = ["demo", f"--data.root={tiny_data}", f"--storage={tmp_path}", "--name=a"]

    def refuse(*_: object) -> None:
        raise InputError("something is wrong")

    monkeypatch.setattr("tune.ablation.train_all", refuse)
    for seeds in (1, 2):
        with pytest.raises(InputError, match="something is wrong"):
            main([*command, f"--seeds={seeds}"])
    names = json.loads((tmp_path / "a" / "ablation.json").read_text())["runs"]
    RunFolder.at(str(tmp_path / "a"), names[-1]).write_json("run.json", {"finished": False})
    with pytest.raises(InputError, match="other settings"):
        main([*command, "--seeds=3"])


def test_a_whole_ablation_and_the_same_command_again(tiny_data, tmp_path, capsys):
    def command(*more):
        return ["demo", f"--data-root={tiny_data}", f"--storage={tmp_path}", "--name=a",
                "--seeds=1", "--architectures", "unet", "attention_resunet", *TINY,
                *more]  # fmt: skip

    main(command())
    said = capsys.readouterr().out
    assert "6 runs of 6 epochs together, 0 of them finished" in said
    assert "[3/6] unet scratch fold 0 seed 0: mIoU 0." in said and "left" in said
    folder = tmp_path / "a"
    names = json.loads((folder / "ablation.json").read_text())["runs"]
    assert len(names) == 6 and all(RunFolder.at(str(folder), name).finished() for name in names)
    lines = list(csv.DictReader((folder / "tables.csv").read_text().splitlines()))
    assert len(lines) == 3 * 2 * 3
    run = RunFolder.at(str(folder), "unet-dino-s0-share1.0")
    config = read_model(folder / run.name / "checkpoint_0001").config
    rows = score(str(folder / run.name), config)
    [shown] = [each for each in lines if [*each.values()][:2] == ["DINO", "unet"]
               and each["metric"] == "miou"]  # fmt: skip
    assert float(shown["mean"]) == pytest.approx(statistics.mean(row.miou for row in rows))
    assert run.read_metrics()[-1]["miou"] == pytest.approx(float(shown["mean"]), abs=1e-6)
    text = (folder / "tables.md").read_text()
    assert "Table 1: from scratch" in text and "validation images among them" in text
    page = (folder / "report.html").read_text()
    assert "Table 3: DINO − scratch" in page and "<svg" in page

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main(command())
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times

    assert exit_status(lambda: main(command("--shares=0.5"))) == 2
    error = capsys.readouterr().err
    assert "other settings" in error and error.count("\n") == 1

    # One of an older version lacks the settings that came later.
    record = json.loads((folder / "ablation.json").read_text())
    del record["settings"]["finetune"]["predict"]["part_threshold"]
    (folder / "ablation.json").write_text(json.dumps(record))
    main(command())
    assert "is finished" in capsys.readouterr().out

    # Killed before the end: only what is missing is done again.
    (folder / "ablation.json").write_text(json.dumps(record | {"finished": False}))
    (folder / "tables.md").unlink()
    last = folder / names[-1] / "run.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"finished": False}))
    before = {name: (folder / name / "run.json").stat().st_mtime_ns for name in names[:-1]}
    main(command())
    said = capsys.readouterr().out
    assert "5 of them finished" in said and "[6/6]" in said and "[5/6]" not in said
    assert {n: (folder / n / "run.json").stat().st_mtime_ns for n in names[:-1]} == before
    assert (folder / "tables.md").read_text() == text
