"""What a run prints and draws: the estimate, the bar, the table, the curves, the predictions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from runs import film_data, make_module, make_trainer

import zolightning as zl
from zolightning.callbacks import PredictionWriter, RunLogger, RunProgress, RunReport, print_table
from zolightning.callbacks.plot import _curve, plot_run


class TestReport:
    def test_estimate_and_table(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report, logger = RunReport(), RunLogger(str(tmp_path))
        trainer = make_trainer(tmp_path, 3, callbacks=[report], logger=logger)
        module = make_module(tiny_folder, lr=1e-2)
        trainer.fit(module, film_data(tmp_path))
        out = capsys.readouterr().out
        parameters = sum(p.numel() for p in module.language_model.parameters())
        assert f"moves        20 blocks, {parameters:,} parameters, float32\n" in out
        assert "costs        2 forwards a step, 3 steps to go, 6 forwards\n" in out
        assert re.search(r"memory       weights 0\.1 MiB, scratch of a probe 0\.0 MiB\n", out)
        assert re.search(r"time         about 0 s of forwards alone \(one took \d+ ms\)\n", out)
        constant = f"loss {report.before['constant_loss']:.3f}, accuracy {report.before['constant_accuracy']:.3f}"
        assert f"constant     always the training rows' label frequencies: {constant}\n" in out
        assert "\n3 steps, 6 forwards, this time " in out
        after = module.evaluate()
        row = f"loss (nats)                     {report.before['loss']:10.4f}{after['loss']:10.4f}{after['constant_loss']:10.4f}\n"
        assert row in out
        assert report.before["loss"] != pytest.approx(after["loss"], abs=1e-4)
        for name in ("accuracy", "loss, bias-corrected", "accuracy, bias-corrected"):
            assert re.search(rf"^{re.escape(name)} +\d\.\d{{4}} +\d\.\d{{4}} +\d\.\d{{4}}$", out, re.M)
        for path in ("curves.png", "metrics.csv"):
            assert (tmp_path / path).is_file()
            assert str(tmp_path / path) in out
        assert float(logger.rows()[-1]["val/loss"]) == pytest.approx(after["loss"])

    def test_rows_that_are_held_out(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Said where there are no validation rows, and only there."""
        for validation, expected in ((None, 1), ("same", 0)):
            data = film_data(tmp_path)
            data.validation_file = None if validation is None else data.train_file
            make_trainer(tmp_path, 1, callbacks=[RunReport()]).fit(make_module(tiny_folder), data)
            out = capsys.readouterr().out
            assert out.count(f"validation   on {len(data.validation_examples)} training rows that are held out") == expected

    def test_held_weights_are_in_the_estimate(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Generation keeps a second copy of what moves."""
        from runs import QUESTIONS

        module = make_module(tiny_folder, objective=zl.Reward("f1", max_new_tokens=1))
        make_trainer(tmp_path, 1, callbacks=[RunReport()], limit_val_batches=1).fit(module, film_data(tmp_path, "squad", QUESTIONS))
        assert "weights 0.1 MiB, scratch of a probe 0.1 MiB" in capsys.readouterr().out

    @pytest.mark.parametrize(("space", "scratch"), [(zl.QuantScaleSpace, 9216 // 64 * 4), (zl.AdapterSpace, 8 * (32 + 32 + 32 + 16) * 4)])
    def test_of_a_quantised_model(
        self,
        tiny_folder: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        space: Any,
        scratch: int,
    ) -> None:
        """Scales are weights too, and a probe takes as much as one layer has of them, or of the adapter."""
        monkeypatch.setattr("zolightning.callbacks.report._size", str)
        module = make_module(tiny_folder, space=space, quantization="nf4")
        make_trainer(tmp_path, 1, callbacks=[RunReport()], limit_val_batches=0).fit(module, film_data(tmp_path))
        weights = sum(p.numel() * p.element_size() for p in module.language_model.parameters()) + 2 * 9216 // 64 * 4
        assert f"memory       weights {weights}, scratch of a probe {scratch}\n" in capsys.readouterr().out

    def test_skipped_steps_are_counted(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        class Sometimes(zl.CandidateCrossEntropy):
            calls = 0

            def rows(self, model: Any, batch: Any) -> Any:
                loss, weight = super().rows(model, batch)
                Sometimes.calls += 1
                return loss * (float("nan") if Sometimes.calls == 9 else 1.0), weight

        make_trainer(tmp_path, 4, callbacks=[RunReport()]).fit(make_module(tiny_folder, objective=Sometimes()), film_data(tmp_path))
        assert re.search(r"\n4 steps, 8 forwards, 1 steps? skipped, this time", capsys.readouterr().out)

    def test_a_resumed_run_compares_with_the_very_first_figures(
        self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second = RunReport(), RunReport()
        trainer = make_trainer(tmp_path, 2, callbacks=[first])
        trainer.fit(make_module(tiny_folder, lr=1e-2), film_data(tmp_path))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        capsys.readouterr()
        make_trainer(tmp_path, 5, callbacks=[second]).fit(
            make_module(tiny_folder, lr=1e-2), film_data(tmp_path), ckpt_path=str(tmp_path / "a.ckpt")
        )
        assert second.before == first.before
        out = capsys.readouterr().out
        assert "3 steps to go" in out
        assert "5 steps, 10 forwards" in out
        assert f"loss (nats)                     {first.before['loss']:10.4f}" in out

    def test_complete_run_does_nothing(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = make_trainer(tmp_path, 2)
        trainer.fit(make_module(tiny_folder), film_data(tmp_path))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        capsys.readouterr()
        report = RunReport()
        make_trainer(tmp_path, 2, callbacks=[report]).fit(make_module(tiny_folder), film_data(tmp_path), ckpt_path=str(tmp_path / "a.ckpt"))
        assert not report.started
        assert capsys.readouterr().out == ""

    def test_another_logger(self, tiny_folder: str, tmp_path: Path) -> None:
        """The figures before and after reach whatever logger the user chose."""
        logger = pl.loggers.CSVLogger(tmp_path / "logs", name="mine", version=0)
        report = RunReport()
        make_trainer(tmp_path, 2, callbacks=[report], logger=logger).fit(make_module(tiny_folder), film_data(tmp_path))
        text = (tmp_path / "logs" / "mine" / "version_0" / "metrics.csv").read_text()
        assert str(report.before["loss"]) in text
        assert not (tmp_path / "metrics.csv").exists()

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_table({"accuracy": 0.5}, {"accuracy": 0.75, "loss": 1.0, "constant_accuracy": 0.25, "unknown": 3.0})
        assert capsys.readouterr().out == (
            "                                    before     after  constant\n"
            "loss (nats)                                   1.0000          \n"
            "accuracy                            0.5000    0.7500    0.2500\n"
        )
        print_table({}, {"f1": 0.125})
        assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["value", "constant"], ["F1", "0.1250"]]
        print_table({}, {"unknown": 3.0})
        assert capsys.readouterr().out == ""


class TestPlot:
    ROWS = (
        {"step": "0", "val/loss": "1.0", "val/accuracy": "0.5", "train/forwards": "0"},
        {"step": "5", "train/loss": "0.9", "train/forwards": "10.0"},
        {"step": "5", "val/loss": "0.8", "val/accuracy": "0.75", "val/constant_loss": "0.7"},
    )

    def test_points(self) -> None:
        """A row without forwards stands at the last ones seen."""
        assert _curve(self.ROWS, "val/loss") == [(0.0, 1.0), (10.0, 0.8)]
        assert _curve(self.ROWS, "train/loss") == [(10.0, 0.9)]
        assert _curve(self.ROWS, "val/f1") == []

    @pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ({"val/loss": "1", "val/f1": "0.2"},)])
    def test_picture(self, rows: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        assert plot_run(rows, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert [str(w.message) for w in recwarn if "legend" in str(w.message)] == []

    @pytest.mark.parametrize("rows", [(), ({"step": "0", "train/lr": "1"},)])
    def test_nothing_to_draw(self, rows: Any, tmp_path: Path) -> None:
        assert not plot_run(rows, tmp_path / "curves.png")
        assert not (tmp_path / "curves.png").exists()

    def test_figures_stay_closed(self, tmp_path: Path) -> None:
        from matplotlib import pyplot as plt

        plot_run(self.ROWS, tmp_path / "curves.png")
        assert plt.get_fignums() == []


class TestPredictions:
    def test_file(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One object a row, in order, umlauts readable; a second run replaces the file."""
        rows = [{"sentence": f"schöner Film {i}"} for i in range(5)]
        for count in (5, 3):
            file = tmp_path / f"test{count}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
            data = film_data(tmp_path, test_file=str(file))
            trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()])
            trainer.predict(make_module(tiny_folder), data, return_predictions=False)
            written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
            assert [row["index"] for row in written] == list(range(count))
            assert {row["label"] for row in written} == {-1}
            assert {row["text"] for row in written} <= {"terrible", "great"}
            assert all(sum(row["probabilities"]) == pytest.approx(1) for row in written)
            assert f"{count} predictions: {tmp_path / 'predictions.jsonl'}\n" in capsys.readouterr().out
        assert not (tmp_path / "predictions.partial").exists()

    def test_text_stays_readable(self, tmp_path: Path) -> None:
        trainer: Any = type("T", (), {"default_root_dir": str(tmp_path / "new"), "is_global_zero": True})()
        PredictionWriter().write_on_epoch_end(trainer, None, [[{"prediction": "größer\n"}], [{"prediction": "東京"}]], [])  # type: ignore[arg-type]
        assert (tmp_path / "new" / "predictions.jsonl").read_text(encoding="utf-8") == (
            '{"prediction": "größer\\n"}\n{"prediction": "東京"}\n'
        )


class TestProgress:
    def run(self, tiny: str, folder: Path, steps: int, **options: Any) -> RunProgress:
        bar = RunProgress(refresh_rate=2)
        callbacks = [bar, *options.pop("callbacks", [])]
        trainer = make_trainer(folder, steps, callbacks=callbacks, enable_progress_bar=True)
        trainer.fit(make_module(tiny), film_data(folder), **options)
        if "ckpt_path" not in options:
            trainer.save_checkpoint(folder / "a.ckpt")
        return bar

    def test_bar(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run(tiny_folder, tmp_path, 5)
        captured = capsys.readouterr()
        last = captured.out.replace("\r", "\n").strip().splitlines()[-1]
        assert "5/5" in last
        assert re.search(r"loss \d\.\d{3}, coefficient -?\d+\.\d{3}, \d+\.\d forwards/s", last)
        assert "forwards/s" not in captured.err, "the bar goes to stdout: stderr is for errors"

    def test_resumed(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It starts at the step of the checkpoint."""
        self.run(tiny_folder, tmp_path, 4)
        capsys.readouterr()
        self.run(tiny_folder, tmp_path, 7, ckpt_path=str(tmp_path / "a.ckpt"))
        lines = capsys.readouterr().out.replace("\r", "\n")
        assert "4/7" in lines
        assert "7/7" in lines
        assert "0/7" not in lines

    def test_stopped_early(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The last line tells how far the run came, also between two refreshes."""

        class Stop(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
                trainer.should_stop = trainer.global_step == 3

        self.run(tiny_folder, tmp_path, 10, callbacks=[Stop()])
        assert "3/10" in capsys.readouterr().out.replace("\r", "\n").strip().splitlines()[-1]

    def test_no_end(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Without max_steps there is no total."""
        bar = RunProgress(refresh_rate=1)
        trainer = make_trainer(tmp_path, -1, max_epochs=1, limit_train_batches=3, callbacks=[bar], enable_progress_bar=True)
        trainer.fit(make_module(tiny_folder), film_data(tmp_path))
        assert "3step" in capsys.readouterr().out

    def test_disabled(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        bar = RunProgress()
        bar.disable()
        trainer = make_trainer(tmp_path, 1, callbacks=[bar], enable_progress_bar=True)
        bar.disable()
        trainer.fit(make_module(tiny_folder), film_data(tmp_path))
        bar.print("a", 1)
        assert capsys.readouterr().out == "a 1\n"
