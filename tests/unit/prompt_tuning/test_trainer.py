import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PromptTuningConfig, get_peft_model

from retune.config import Tune
from retune.errors import StageError
from retune.inference import decoder
from retune.inference.decoder import run_prefix
from retune.inference.encoding import Encoder
from retune.inference.inputs import EncodedRow, encode_with_answers
from retune.prompt_tuning import DivergedError, initial_prompt, trainer
from retune.prompt_tuning.checkpoints import Checkpoint, Stop, StoppedError
from retune.prompt_tuning.prefixes import SoftPrompt
from retune.prompt_tuning.schedule import epoch_batches, learning_rate_at
from retune.prompt_tuning.trainer import optimise, validation_batches, validation_loss

SETTINGS = Tune(learning_rate=0.05, epochs=4, batch_size=8, warmup_steps=3, max_grad_norm=1.0, validate_every=5, seed=13)


def encoded(base, count, seed):
    return encode_with_answers(base, Encoder(tiny.make_prompt(), base.tokenizer), 4, tiny.make_rows(count, seed))[0]


def run(base, train=None, validation=None, start=None, on_step=lambda _: None, checkpoint=None, stop=None, **changes):
    train = encoded(base, 32, 0) if train is None else train
    validation = encoded(base, 24, 1) if validation is None else validation
    start = initial_prompt("sampled_vocabulary", base, 4, 13) if start is None else start
    settings = SETTINGS.model_copy(update=changes)
    return optimise(base, SoftPrompt(base, start), train, validation, settings, on_step, checkpoint, stop)


def test_tuning_lowers_the_validation_loss(base):
    result = run(base)
    assert result.best_validation_loss < 0.9 * result.initial_validation_loss
    assert result.steps == 16
    batches = validation_batches(base, encoded(base, 24, 1), run_prefix(base, result.best["prompt_embeddings"]))
    assert validation_loss(base, lambda: run_prefix(base, result.best["prompt_embeddings"]), batches) == result.best_validation_loss


def test_the_same_run_gives_the_same_bytes(base):
    one, two = run(base), run(base)
    assert one.best["prompt_embeddings"].numpy().tobytes() == two.best["prompt_embeddings"].numpy().tobytes()
    assert one.curve == two.curve
    assert one.best["prompt_embeddings"].numpy().tobytes() != run(base, seed=14).best["prompt_embeddings"].numpy().tobytes()


def test_only_the_prompt_changes(base):
    before = copy.deepcopy(base.model.state_dict())
    start = initial_prompt("sampled_vocabulary", base, 4, 13)
    kept = start.clone()
    result = run(base, start=start)
    assert all(torch.equal(before[name], value) for name, value in base.model.state_dict().items())
    assert all(p.grad is None for p in base.model.parameters())
    assert not base.model.training
    assert torch.equal(start, kept)
    assert not torch.equal(result.best["prompt_embeddings"], start)
    assert not result.best["prompt_embeddings"].requires_grad


def test_the_curve_has_a_row_per_step_and_is_streamed(llama):
    streamed = []
    result = run(llama, on_step=streamed.append)
    assert streamed == result.curve
    assert [row["step"] for row in result.curve] == list(range(1, 17))
    assert [row["epoch"] for row in result.curve] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert [row["step"] for row in result.curve if row["validation_loss"] is not None] == [5, 10, 15, 16]
    assert [row["learning_rate"] for row in result.curve] == [learning_rate_at(s, 0.05, 3, 16) for s in range(1, 17)]


def test_every_step_is_that_of_a_plain_peft_loop(llama):
    """PEFT's model, torch's AdamW and clipping, written out: the reference for loss, order of rows, rate and update."""
    train = encoded(llama, 32, 0)
    start = initial_prompt("sampled_vocabulary", llama, 4, 13)
    model = get_peft_model(
        tiny.make_model("llama", len(llama.tokenizer)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(start)
    optimizer = torch.optim.AdamW([weight], lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    losses = []
    for step, (_, numbers) in enumerate(epoch_batches([1] * 32, Tune(batch_size=8, epochs=2, seed=13)), 1):
        batch = tiny.padded([train[i] for i in numbers], "right")
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, 0.05, 3, 8)
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    result = run(llama, train, start=start, epochs=2, weight_decay=0.1, max_grad_norm=0.5, validate_every=100)
    assert [row["train_loss"] for row in result.curve] == pytest.approx(losses, rel=1e-4)
    assert result.best_step == 8
    torch.testing.assert_close(result.best["prompt_embeddings"], weight.detach(), rtol=0, atol=1e-3)


def test_the_best_prompt_on_validation_is_kept_and_not_the_last(llama, monkeypatch):
    """Validation losses are made up: the prompt must be that of the step with the least."""
    made_up = iter([5.0, 4.0, 2.0, 3.0, 2.5])
    seen = []

    def fake(base, prefix, batches):
        seen.append(prefix.__self__.values.detach().clone())
        return next(made_up)

    monkeypatch.setattr(trainer, "validation_loss", fake)
    result = run(llama)  # validates at the start and after steps 5, 10, 15, 16
    assert (result.best_step, result.best_validation_loss, result.initial_validation_loss) == (10, 2.0, 5.0)
    assert torch.equal(result.best["prompt_embeddings"], seen[2])
    assert not torch.equal(result.best["prompt_embeddings"], seen[4])


def test_training_that_spoils_validation_returns_where_it_started(llama):
    """Validation answers contradict the training answers: every step makes them less likely."""
    prompt = list(range(10, 20))
    train = [EncodedRow(prompt, [40])] * 8
    start = initial_prompt("sampled_vocabulary", llama, 4, 13)
    to_forty = run(llama, train, train, start=start).best["prompt_embeddings"]
    result = run(llama, [EncodedRow(prompt, [41])] * 8, train, start=to_forty)
    assert result.best_step == 0
    assert torch.equal(result.best["prompt_embeddings"], to_forty)
    assert result.curve[-1]["validation_loss"] > result.initial_validation_loss


def test_a_loss_that_is_not_finite_stops_the_run_and_hands_over_the_best_prompt(llama, monkeypatch):
    real, calls = decoder.answer_losses, []

    def fails_at_seven(*arguments):
        calls.extend([1] if torch.is_grad_enabled() else [])
        return real(*arguments) * (torch.nan if len(calls) == 7 and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(decoder, "answer_losses", fails_at_seven)
    with pytest.raises(DivergedError, match=r"training loss must be finite, got nan at step 7 .*lower tune.learning_rate.*step 5") as error:
        run(llama)
    assert isinstance(error.value, StageError)
    assert error.value.step == 7
    assert error.value.best.best_step == 5
    assert torch.isfinite(error.value.best.best["prompt_embeddings"]).all()
    assert len(error.value.best.curve) == 6


def test_a_gradient_that_is_not_finite_stops_the_run(llama):
    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    real = decoder.answer_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "answer_losses", lambda *arguments: Exploding.apply(real(*arguments)))
        with pytest.raises(DivergedError, match=r"gradient norm must be finite, got (nan|inf) at step 1"):
            run(llama)


def test_a_low_learning_rate_warns(llama, caplog):
    with caplog.at_level(logging.WARNING):
        run(llama, epochs=1, learning_rate=5e-5)
        assert "tune.learning_rate 5e-05 is below 0.001" in caplog.text
        caplog.clear()
        run(llama, epochs=1, learning_rate=1e-3)
        assert not caplog.text


def test_memory_that_does_not_suffice_halves_the_parts_and_changes_no_step(llama, monkeypatch, caplog):
    whole = run(llama, epochs=1)
    real, most = decoder.answer_losses, []

    def small(base, prefix, packed):
        if torch.is_grad_enabled():
            if len(packed.ids) > 60:
                raise torch.OutOfMemoryError
            most.append(len(packed.ids))
        return real(base, prefix, packed)

    monkeypatch.setattr(decoder, "answer_losses", small)
    parted = run(llama, epochs=1)
    assert "out of memory: batches go through in parts of at most" in caplog.text
    assert [row["train_loss"] for row in parted.curve] == pytest.approx([row["train_loss"] for row in whole.curve], rel=1e-4)
    assert max(most) <= 60

    def smaller(*arguments):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return real(*arguments)

    monkeypatch.setattr(decoder, "answer_losses", smaller)
    with pytest.raises(StageError, match=r"out of memory on a single row of \d+ tokens after 4 virtual ones; lower preprocess.max_tokens"):
        run(llama, epochs=1)


WITHOUT_MEMORY = """
import logging, resource, sys
import torch, tiny
from retune.inference.inputs import EncodedRow
from retune.prompt_tuning import trainer
from retune.prompt_tuning.prefixes import SoftPrompt
from retune.config import Tune
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
torch.set_num_threads(1)
base = tiny.make_base("llama")
rows = [EncodedRow([5 + i % 90] * 100, [40 + i % 3]) for i in range(512)]

def gradient(room):
    settings = Tune(num_virtual_tokens=4, batch_size=512)
    start = SoftPrompt(base, torch.zeros(4, base.hidden_size))
    run = trainer._Run(base, start, rows, rows[:4], settings, trainer.Stop())
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room if room else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    loss = run._gradient(rows)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return loss, next(iter(run.tuned.parameters.values())).grad, run.tokens

start = SoftPrompt(base, torch.zeros(4, base.hidden_size))
trainer._Run(base, start, rows[:8], rows[:4], Tune(num_virtual_tokens=4), trainer.Stop())._gradient(rows[:8])
loss, slope, tokens = gradient(int(sys.argv[1]) << 20)
whole, other, at_once = gradient(0)
assert tokens is not None and at_once is None, (tokens, at_once)
assert abs(loss - whole) <= 1e-5 * whole
assert (slope - other).norm() <= 1e-4 * other.norm()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory by Linux' means")
def test_where_the_processors_memory_does_not_suffice_either_a_batch_goes_through_in_parts():
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY, "60"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of memory: batches go through in parts of at most" in done.stdout


def test_patience_ends_a_run_that_no_longer_learns(llama, caplog):
    prompt = list(range(10, 20))
    train = [EncodedRow(prompt, [40])] * 8
    result = run(llama, [EncodedRow(prompt, [41])] * 8, train, validate_every=1, patience=2, epochs=30)
    assert result.steps == result.best_step + 2
    assert "no better validation loss in 2 validations: stopped early" in caplog.text


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 9, 16])
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bytes(base, tmp_path, at):
    """Killed after any step: the curve and the prompt are those of an undisturbed run."""
    whole = run(base)

    def die(row):
        if row["step"] == at:
            raise Killed

    checkpoint, seen = Checkpoint(tmp_path / "checkpoint", 0), []
    with pytest.raises(Killed):
        run(base, on_step=die, checkpoint=checkpoint)
    again = run(base, on_step=lambda row: seen.append(row["step"]), checkpoint=checkpoint)
    assert seen == list(range(at, 17))
    assert again.best["prompt_embeddings"].numpy().tobytes() == whole.best["prompt_embeddings"].numpy().tobytes()
    assert again.curve == whole.curve
    assert (again.best_step, again.best_validation_loss) == (whole.best_step, whole.best_validation_loss)


def test_batches_by_tokens_go_on_in_the_middle_of_an_epoch(llama, tmp_path):
    rows = encoded(llama, 32, 0)
    batch_tokens = 3 * max(map(len, rows))
    whole = run(llama, rows, batch_tokens=batch_tokens)
    assert whole.steps > 4 * 32 / 8
    sizes = [len(numbers) for _, numbers in epoch_batches([*map(len, rows)], SETTINGS.model_copy(update={"batch_tokens": batch_tokens}))]
    assert len(sizes) == whole.steps
    assert {3, 4} <= set(sizes)
    assert sum(sizes[:7]) % 32, "step 7 ends an epoch"

    def die(row):
        if row["step"] == 7:
            raise Killed

    checkpoint, seen = Checkpoint(tmp_path / "checkpoint", 0), []
    with pytest.raises(Killed):
        run(llama, rows, batch_tokens=batch_tokens, on_step=die, checkpoint=checkpoint)
    again = run(llama, rows, batch_tokens=batch_tokens, on_step=lambda row: seen.append(row["step"]), checkpoint=checkpoint)
    assert seen == list(range(7, whole.steps + 1))
    assert again.best["prompt_embeddings"].numpy().tobytes() == whole.best["prompt_embeddings"].numpy().tobytes()
    assert again.curve == whole.curve


@pytest.mark.parametrize(("kind", "steps"), [("llama", 4), ("t5", 8)])
def test_virtual_tokens_count_where_each_row_has_its_own(kind, steps):
    base = tiny.make_base(kind)
    rows, start = [EncodedRow([10, 11, 12], [40, 1])] * 8, initial_prompt("sampled_vocabulary", base, 4, 13)
    settings = SETTINGS.model_copy(update={"epochs": 1, "batch_tokens": 10})
    assert optimise(base, SoftPrompt(base, start), rows, rows, settings).steps == steps


def test_a_stopped_run_saves_where_it_stands_and_goes_on_from_there(llama, tmp_path):
    """SIGTERM may come at any moment: in the update, it waits for its end."""
    whole, stop, file = run(llama), Stop(), tmp_path / "checkpoint"
    real = torch.optim.AdamW.step

    def ask_within_the_update(self, *arguments):
        real(self, *arguments)
        if self.param_groups[0]["lr"] == learning_rate_at(5, 0.05, 3, 16):  # a step that validates
            stop._ask(15, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", ask_within_the_update)
        with pytest.raises(StoppedError, match="at step 5 of 16; the checkpoint is saved"):
            run(llama, checkpoint=Checkpoint(file, 3600), stop=stop)
    again = run(llama, checkpoint=Checkpoint(file, 3600))
    assert again.curve == whole.curve
    assert again.best["prompt_embeddings"].numpy().tobytes() == whole.best["prompt_embeddings"].numpy().tobytes()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"x", lambda _: b"", lambda b: b[70:]])
def test_a_damaged_checkpoint_is_named_and_counts_as_none(llama, tmp_path, caplog, damage):
    whole, file = run(llama, epochs=1), tmp_path / "checkpoint"
    run(llama, epochs=1, checkpoint=Checkpoint(file, 0))
    file.write_bytes(damage(file.read_bytes()))
    again = run(llama, epochs=1, checkpoint=Checkpoint(file, 3600))
    assert "is damaged" in caplog.text
    assert again.curve == whole.curve
