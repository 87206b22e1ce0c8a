"""GPU code rehearsed without a GPU: no operation mixes devices, and no step waits for the GPU.

Operations that need real values are left out: towers and prompts are built on the CPU and moved, and gradients are
zeros. At the end of epochs, evaluations and predictions the host has to wait; the tests assert what it waits for.
"""

import json
from dataclasses import replace
from functools import cache
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from CLIP.clip import create_model
from CLIP.weights import find_weights
from dataset.medical_few import Shots
from engine import baselines, distributed
from engine.detector import Detector, seeded
from engine.distributed import pick_autocast
from engine.evaluation import Masks, evaluate
from engine.features import TokenStore
from engine.files.checkpoint import Checkpoint
from engine.predictor import Predictor
from engine.training import TrainingSet, TrainingState, check_losses
from tests.helpers.data import draw_samples, small_settings, store_options
from tests.helpers.rehearsal import COPY, CUDA, VALUE, rehearsal

PRECISIONS = pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])


@cache
def built(**changes):
    """Towers and detector, on the CPU."""
    settings = small_settings(img_size=28, **changes)
    clip = create_model("ViT-tiny-14-56", "random", 28, fidelity=settings.fidelity, seed=1)
    return clip, Detector(clip, settings, 5)


class World:
    """A small run on the rehearsed GPU: samples on disk, their tokens in a store, and a detector."""

    def __init__(self, folder, mode, autocast=None, **changes):
        self.settings, self.samples = small_settings(img_size=28, **changes), draw_samples(folder)
        shots = TrainingSet.build(Shots([self.samples[1]], [self.samples[0]], "drawn"), self.settings, 5)
        weights = find_weights("ViT-tiny-14-56", "random", None, 1)
        self.store = TokenStore(self.settings, weights, autocast, CUDA, store_options(folder, cache="gpu"))
        self.store.plan(shots.items, [self.samples])
        self.clip, self.detector = mode.moved(built(**changes))
        visual = self.clip.visual
        self.store.fill(self.clip)
        self.clip.visual = visual  # `fill` frees it
        self.shots, self.state = shots.to(self.store), TrainingState(self.detector, autocast, 0.001, 5)
        mode.waits.clear()

    def step(self, masks=True):
        rows, labels, views = next(self.shots.batches(torch.arange(len(self.shots)), 8))
        return self.state.step(self.store, rows, labels, views if masks else None, None)


@PRECISIONS
@pytest.mark.parametrize("adapters", ["MFCFC", "MCNNFC", "MViTFC"])
def test_steps_and_evaluations_mix_no_devices_and_do_not_wait(tmp_path, adapters, autocast):
    with rehearsal() as mode:
        world = World(tmp_path, mode, autocast, visionA=adapters)
        losses = [world.step(masks) for masks in (True, False)]
        assert {loss.device for loss in losses} == {CUDA}
        assert {p.grad.device for p in world.detector.adapters.parameters() if p.grad is not None} == {CUDA}
        assert mode.waits == []
        check_losses(torch.stack(losses), 1)
        assert mode.waits == [COPY]  # once per epoch
        mode.waits.clear()

        for pixels in (True, False):
            world.detector.settings = replace(world.settings, pixel_metrics=pixels)
            evaluation = evaluate(world.detector, world.store, world.samples)
            assert mode.waits == [VALUE]  # whether all scores are finite: once per evaluation
            mode.waits.clear()
            assert evaluation.maps(slice(0, 4)).device == evaluation.maps([0, 2]).device == CUDA
            assert mode.waits == []
            assert evaluation.image_scores.shape == (6,)
            assert mode.waits == [COPY]  # all scores at once
            mode.waits.clear()
        masks = Masks.of(world.samples, world.settings, device=CUDA)
        assert masks.get(slice(0, 4)).device == masks.get([1, 2]).device == CUDA
        assert mode.waits == []


def test_corrected_fidelity_does_not_wait_either(tmp_path):
    with rehearsal() as mode:
        changes = {"fidelity": "corrected", "visionA": "MViTFC", "loss_type": "softmax", "dec_type": "both"}
        world = World(tmp_path, mode, torch.bfloat16, **changes)
        world.step()
        assert mode.waits == []
        evaluate(world.detector, world.store, world.samples)
        assert mode.waits == [VALUE]


@pytest.mark.parametrize(("generation", "dtype"), [(7, torch.float16), (8, torch.bfloat16)])
def test_bfloat16_only_if_the_gpu_computes_it(monkeypatch, generation, dtype):
    """float16 is chosen on a T4 (compute capability 7.5): it accepts bfloat16, but only emulates the products."""
    properties = SimpleNamespace(major=generation)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_properties", properties),
                        ("_check_bf16_tensor_supported", True)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert pick_autocast("auto", CUDA) is dtype


def test_processes_exchange_tokens_in_host_memory(tmp_path, monkeypatch):
    """Tokens are sent as CPU tensors: a GPU tensor unpickled by another process would use memory of its first GPU."""
    sent = []
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "from_main", lambda value: value)
    monkeypatch.setattr(distributed, "all_gather", lambda value: sent.append(value) or [value])
    with rehearsal() as mode:
        World(tmp_path, mode)
    assert {value[1].device.type for value in sent if isinstance(value, tuple)} == {"cpu"}


@PRECISIONS
def test_prediction_waits_only_for_its_results(tmp_path, autocast):
    with rehearsal() as mode:
        world = World(tmp_path, mode, autocast)
        model = Predictor(Checkpoint(world.settings, {}, {}), world.detector, world.clip, autocast)
        assert model.compute(model.network.patches, torch.rand(3, 3, 28, 28)).device == CUDA
        assert mode.waits == []
        prediction = model.predict(world.samples[0].path)
        assert prediction.heat.shape == (28, 28)
        assert mode.waits == [VALUE, COPY]  # score and map


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no masks"])
def test_baselines_wait_only_while_they_are_fitted(tmp_path, masks):
    """Fitted baselines score without waiting; not tested for scikit-learn's, which reads values of every batch."""
    with rehearsal() as mode:
        world = World(tmp_path, mode)
        tokens = [layer.float() for layer in world.store.get(world.shots.rows)]
        pooled = baselines.pool_masks(world.shots.masks, tokens[0].shape[1]) if masks else None
        training = baselines.Training(tokens, world.shots.labels.bool(), pooled, seeded(5, "baselines"))
        norm, projection = world.clip.visual.ln_post, world.clip.visual.proj
        batch = [layer.float() for layer in world.store.get(world.store.rows(world.samples))]
        methods = baselines.fit(training, lambda x: norm(x) @ projection, world.detector.prompts().detach())
        for name, scores in islice(methods, 3):
            mode.waits.clear()
            assert (scores(batch).device, mode.waits, name) == (CUDA, [], name)


@pytest.mark.parametrize(("device", "code", "outcome"), [("cpu", 0, "passed"), ("cuda", 1, "failed")])
def test_gpu_benchmark_reports_each_part(command, tmp_path, device, code, outcome):
    """benchmarks.gpu reports a failed part with its reason and still runs the other parts (slow parts: not here)."""
    flags = ["--device", device, "--small", "--parts", "fp32", "full card", "--json", tmp_path / "g.json"]
    done = command("benchmarks.gpu", *flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code, done.stdout[-3000:]
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [(row["part"], row["result"]) for row in rows] == [("fp32", outcome), ("full card", outcome)]
    assert all(bool(row.get("reason")) is (outcome == "failed") for row in rows)
