"""Loops of accelerate and diffusers, PEFT adapters, and model folders: the real libraries."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from loop_averages import assert_average, same, snapshot_of
from page_sections import assert_averaging_helped, run_example, run_section

from posthoc_ema import EMA, SnapshotStore, StateError, StructureError, reconstruct

pytestmark = [
    # Deprecations inside the frameworks.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Its state is one for the process: a Trainer of another test must not set it."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


@pytest.fixture(scope="module")
def ema_model() -> Any:
    from posthoc_ema.integrations.diffusers import EMAModel

    return EMAModel


def tiny_unet(seed: int = 0) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=2,
    )  # fmt: skip


def step_weights(model: Any, seed: int) -> None:
    """Something that moves the weights, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def train(unet: Any, ema: Any, accelerator: Any, batches: int, first: int = 0) -> dict[float, Any]:
    """The inside of the official scripts' loop; returns the weights after each step."""
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    history = {}
    for batch in range(first, batches):
        with accelerator.accumulate(unet):
            x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
            loss = (unet(x, torch.tensor([3, 5])).sample - x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
            history[ema.ema.t] = snapshot_of(accelerator.unwrap_model(unet))
    return history


def test_the_loop_of_the_scripts(diffusers: Any, ema_model: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    unet = tiny_unet()
    ema = ema_model(unet, snapshots=tmp_path / "ema", every=2)
    ema.to(accelerator.device)
    ema.pin_memory()
    assert ema.cur_decay_value is None
    history = train(unet, ema, accelerator, batches=12)
    assert ema.ema.t == 6
    assert_average(ema.ema.average(0.1), history, 0.1)
    # Eq. 127: (1 - 1/6)^(γ+1) with γ = 6.937 for 0.10.
    assert ema.cur_decay_value == pytest.approx((5 / 6) ** 7.9372, rel=1e-4)

    raw = snapshot_of(unet)
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    assert_average(snapshot_of(unet), history, 0.1)
    with pytest.raises(StateError, match="update was called inside applied"):
        ema.step(unet.parameters())  # averages are not trained on
    ema.save_pretrained(tmp_path / "inside")
    ema.restore(unet.parameters())
    assert same(raw, snapshot_of(unet))
    with pytest.raises(StateError, match="call store before copy_to"):
        ema.restore(unet.parameters())

    # As the save and load hooks of the scripts do.
    ema.save_pretrained(tmp_path / "unet_ema")
    assert same(raw, snapshot_of(unet))
    for folder in ("inside", "unet_ema"):
        loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / folder)
        assert_average(snapshot_of(loaded), history, 0.1)
    resumed = ema_model(unet)
    resumed.load_state_dict(
        ema_model.from_pretrained(tmp_path / "unet_ema", diffusers.UNet2DModel).state_dict()
    )
    for one in (ema, resumed):
        step_weights(unet, 1)
        one.step(unet.parameters())
        step_weights(unet, 2)
    assert resumed.ema.t == ema.ema.t == 7

    ema.copy_to(unet.parameters())  # at the end, for good
    assert same(snapshot_of(unet), {k: v.numpy() for k, v in ema.ema.average(0.1).items()})


def test_accelerate_checkpoints(diffusers: Any, ema_model: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def make(registered: bool = True) -> Any:
        accelerator, unet = Accelerator(cpu=True), tiny_unet()
        ema = ema_model(unet, snapshots=tmp_path / "ema", every=1)
        if registered:
            accelerator.register_for_checkpointing(ema)
        return accelerator, unet, ema

    accelerator, unet, ema = make()
    train(unet, ema, accelerator, batches=3)
    accelerator.save_state(tmp_path / "checkpoint")
    expected = ema.ema.state_dict()["averages"]
    train(unet, ema, accelerator, batches=5, first=3)

    accelerator, unet, ema = make()
    unet = accelerator.prepare(unet)
    accelerator.load_state(tmp_path / "checkpoint")
    assert ema.ema.t == 3
    assert all(map(same, ema.ema.state_dict()["averages"], expected))
    ema.step(unet.parameters())
    assert sorted({s.t for s in SnapshotStore(tmp_path / "ema").list()}) == [1, 2, 3, 4]
    assert len(list((tmp_path / "ema" / "abandoned").rglob("*.safetensors"))) == 4

    # Not registered: averages would begin anew, and the run's snapshots say that it has some.
    accelerator, unet, ema = make(registered=False)
    unet = accelerator.prepare(unet)
    with pytest.raises(ValueError, match="belongs to another run"):
        ema.step(unet.parameters())
    # A checkpoint from before the EMA.
    accelerator.save_state(tmp_path / "old")
    accelerator, unet, ema = make()
    accelerator.prepare(unet)
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        accelerator.load_state(tmp_path / "old")


def test_what_ema_model_refuses(diffusers: Any, ema_model: Any, tmp_path: Path) -> None:
    unet = tiny_unet()
    with pytest.raises(TypeError, match=r"Write EMAModel\(unet, ...\) for EMAModel\(unet\.param"):
        ema_model(unet.parameters())
    with pytest.raises(TypeError, match=r"decay, model_cls of .* are not .*Exponential\.from_beta"):
        ema_model(unet, decay=0.9999, model_cls=diffusers.UNet2DModel)
    with pytest.raises(ValueError, match=r"validate_with=0\.2 is not among"):
        ema_model(unet, validate_with=0.2)
    ema = ema_model(unet)
    for others in (tiny_unet().parameters(), [], tiny_unet()):
        with pytest.raises(StructureError, match="not parameters of the model"):
            ema.step(others)
    with pytest.raises(ValueError, match="float32"):
        ema.to(dtype=torch.float16)
    with pytest.raises(StateError, match="no averages yet"):
        ema.copy_to(unet)
    unet.save_pretrained(tmp_path)
    with pytest.raises(StateError, match=r"holds no ema_state\.safetensors: it is older"):
        ema_model.from_pretrained(tmp_path, diffusers.UNet2DModel)
    plain = ema_model(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="Linear has no save_pretrained"):
        plain.save_pretrained(tmp_path)


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=8,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def track(model: Any, folder: Path, **options: Any) -> None:
    ema = EMA(snapshots=folder, every=4, **options)
    for step in range(16):
        step_weights(model, step)
        ema.update(model)


@pytest.mark.parametrize("kind", ["diffusers", "transformers"])
@pytest.mark.parametrize("from_folder", [False, True])
def test_a_reconstruction_becomes_a_model_folder(
    diffusers: Any, tmp_path: Path, kind: str, from_folder: bool
) -> None:
    from posthoc_ema.integrations.pretrained import save_pretrained

    model = tiny_unet() if kind == "diffusers" else tiny_gpt2()
    track(model, tmp_path / "ema")
    before, mode = snapshot_of(model), model.training
    like: Any = model
    if from_folder:
        model.save_pretrained(tmp_path / "checkpoint")
        like = str(tmp_path / "checkpoint")
    weights = save_pretrained(tmp_path / "ema", 0.07, like, tmp_path / "made")
    assert same(before, snapshot_of(model))
    assert model.training == mode
    loaded = type(model).from_pretrained(tmp_path / "made")
    assert same(snapshot_of(loaded), {k: weights.params[k].numpy() for k in before})
    assert 0 < weights.predicted_error < 1


def test_a_compiled_model_becomes_a_model_folder(tmp_path: Path) -> None:
    from posthoc_ema.integrations.pretrained import save_pretrained

    model = tiny_gpt2()
    compiled = torch.compile(model, backend="eager")
    track(compiled, tmp_path / "ema")
    weights = save_pretrained(tmp_path / "ema", 0.07, compiled, tmp_path / "made")
    loaded = snapshot_of(type(model).from_pretrained(tmp_path / "made"))
    assert same(loaded, {k: weights.params[k].numpy() for k in loaded})


def test_part_of_a_larger_module_and_half_precision(tmp_path: Path) -> None:
    from posthoc_ema.integrations.pretrained import save_pretrained

    model = tiny_gpt2()
    track(torch.nn.ModuleDict({"model": model, "other": torch.nn.Linear(2, 2)}), tmp_path / "ema")
    with pytest.raises(StructureError, match=r"model\.transformer\.\S+ has shape .*prefix="):
        save_pretrained(tmp_path / "ema", 0.07, model, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    with pytest.raises(StructureError, match="no name in the snapshots begins with prefix='net"):
        save_pretrained(tmp_path / "ema", 0.07, model, tmp_path / "made", prefix="net.")
    model.bfloat16()
    weights = save_pretrained(tmp_path / "ema", 0.07, model, tmp_path / "made", prefix="model.")
    loaded = type(model).from_pretrained(tmp_path / "made", dtype="auto")
    for name, value in loaded.named_parameters():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights.params[f"model.{name}"].bfloat16())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    from posthoc_ema.integrations.pretrained import save_pretrained

    track(torch.nn.Linear(2, 2), tmp_path / "ema")
    with pytest.raises(ValueError, match="must be a model with save_pretrained"):
        save_pretrained(tmp_path / "ema", 0.07, torch.nn.Linear(2, 2), tmp_path / "made")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        save_pretrained(tmp_path / "ema", 0.07, tmp_path, tmp_path / "made")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no class of diffusers or transformers"):
        save_pretrained(tmp_path / "ema", 0.07, tmp_path, tmp_path / "made")
    with pytest.raises(StructureError, match="weight has shape"):
        save_pretrained(tmp_path / "ema", 0.07, tiny_gpt2(), tmp_path / "made")


def with_lora(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    )


def test_of_a_peft_model_the_adapter_alone_is_tracked(tmp_path: Path) -> None:
    from peft import PeftModel

    from posthoc_ema.integrations.pretrained import save_pretrained

    model = with_lora(modules_to_save=["ln_f"])
    track(model, tmp_path / "ema")
    snapshot = SnapshotStore(tmp_path / "ema").list()[-1]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(snapshot.averages) == trained
    assert not snapshot.copy_sources()
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < whole / 10

    before = snapshot_of(model)
    weights = save_pretrained(tmp_path / "ema", 0.07, model, tmp_path / "adapter")
    assert same(before, snapshot_of(model))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded = snapshot_of(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "adapter"))
    assert same({n: loaded[n] for n in trained}, {n: v.numpy() for n, v in weights.params.items()})


def test_adapters_inside_other_modules(diffusers: Any, tmp_path: Path) -> None:
    """As the LoRA scripts of diffusers make them, and inside a module of one's own."""
    from peft import LoraConfig

    from posthoc_ema.integrations.pretrained import holding

    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"]))
    track(torch.nn.ModuleDict({"unet": unet}), tmp_path / "ema")
    names = list(SnapshotStore(tmp_path / "ema").list()[-1].averages)
    assert names
    assert all(name.startswith("unet.") and "lora_" in name for name in names)
    weights = reconstruct(tmp_path / "ema", 0.1)
    with holding(unet, weights, prefix="unet."):
        unet.save_lora_adapter(tmp_path / "adapter")
        inside = snapshot_of(unet)
    assert same({n: inside[n.removeprefix("unet.")] for n in names},
                {n: v.numpy() for n, v in weights.params.items()})  # fmt: skip
    assert not np.array_equal(inside[names[0].removeprefix("unet.")],
                              snapshot_of(unet)[names[0].removeprefix("unet.")])  # fmt: skip


def test_more_or_less_than_the_adapter(tmp_path: Path) -> None:
    model = with_lora()
    ema = EMA(0.1, include="*")
    ema.update(model)
    assert len(ema.average()) > 20
    only = EMA(0.1, include="*lora_A*")
    only.update(model)
    assert all("lora_A" in name for name in only.average())
    without = EMA(0.1, exclude="*lora_B*")
    without.update(model)
    assert without.average().keys() == only.average().keys()
    model.requires_grad_(False)
    with pytest.raises(StructureError, match="nothing in it is trained"):
        EMA(0.1).update(model)


def test_a_frozen_part_that_thaws_changes_nothing(tmp_path: Path) -> None:
    # What is tracked was decided at the first update; a resumed run must agree with it.
    model = with_lora()
    ema = EMA(0.1)
    ema.update(model)
    names = set(ema.average())
    next(p for p in model.parameters() if not p.requires_grad).requires_grad_(True)
    step_weights(model, 1)
    ema.update(model)
    assert set(ema.average()) == names


@pytest.mark.parametrize("heading", ["accelerate and diffusers", "PEFT and LoRA"])
def test_the_page(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_section(heading) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_diffusers", "train_peft"])
def test_the_examples(name: str, tmp_path: Path) -> None:
    assert_averaging_helped(run_example(name, tmp_path))
