"""Stage tune and its MLflow run: a server that is away stops no tuning."""

import socket

import pytest

from retune.stages.tune import _stream

ROW = {"step": 1, "epoch": 1, "train_loss": 1.0, "validation_loss": 0.5, "learning_rate": 0.1}


def test_without_a_server_the_curve_is_printed_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
        with _stream() as send:
            send(ROW)
    out, err = capfd.readouterr()
    assert "validation_loss 0.5" in out
    assert "MLflow is away" in err
