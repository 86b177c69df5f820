import copy
import re

import peft
import pytest
import torch
import transformers
from helpers import rms_error, tiny_config, tiny_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora as lora
from minilora.adapters.dora import DoraLinear
from minilora.adapters.lora_bias import BiasedLinear
from minilora.adapters.offset import OffsetLinear
from minilora.adapters.trainable import count_parameters
from minilora.phi3 import Phi3Config, Phi3ForCausalLM

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
COOKBOOK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the Phi-3 cookbook's own list


@pytest.fixture
def model():
    return tiny_model(tiny_config())


def hugging_face():
    """transformers' Phi-3 in the shape of the tiny model."""
    config = tiny_config()
    fields = {name: value for name, value in vars(config).items() if value is not None}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**fields))


def llama():
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))


class ConvNet(nn.Module):
    """A residual block as in torchvision, with a stem, a depthwise convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)
        )
        self.classifier = nn.Linear(8, 5)

    def forward(self, images):
        h = self.stem(images)
        return self.classifier((h + self.block(h)).mean(dim=(2, 3)))


IDS, IMAGES = torch.arange(12).view(2, 6), torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
MODELS = {
    "phi3 of transformers": (hugging_face, IDS, ["qkv_proj", "down_proj", "embed_tokens", "lm_head"]),
    "llama of transformers": (llama, IDS, ["q_proj", "v_proj", "gate_proj", "embed_tokens"]),
    "convolutions": (ConvNet, IMAGES, ["stem.0", "block.0", "block.3", "classifier"]),
    "our phi3": (lambda: tiny_model(tiny_config()), IDS, ["q_proj", "v_proj", "o_proj", "embed_tokens"]),
}


def logits(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def filled(model):
    """The model with adapters that are not zero, and learn alone."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0.0, 0.2, generator)
    lora.mark_only_lora_as_trainable(model)
    return model


@pytest.fixture(params=MODELS)
def case(request):
    """A model with adapters in eval mode, its input, the plain model that it was made from and its targets."""
    make, x, targets = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    plain = copy.deepcopy(model)
    return filled(lora.inject(model, lora.LoraConfig(r=2, target_modules=targets))), x, plain, targets


def adapters(model) -> dict[str, lora.LoRALayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, lora.LoRALayer)}


def assert_refused_unchanged(model, config, *messages):
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(messages[0])) as refused:
        lora.inject(model, config)
    for message in messages:
        assert message in str(refused.value)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[path] is module for path, module in before.items())


# PEFT's rules


@pytest.mark.parametrize(
    "target_modules",
    [
        ["o_proj"],
        FUSED,
        ["lm_head"],
        ["embed_tokens", "o_proj"],
        ["model.layers.0.mlp.down_proj"],
        ["1.self_attn.o_proj", "mlp.gate_up_proj"],
        r".*\.1\..*_proj",
        r"model\.layers\.0\.self_attn\.(qkv|o)_proj",
        r".*(lm_head|o_proj)",
        "all-linear",
    ],
)
def test_the_same_modules_are_adapted_as_by_peft(model, target_modules):
    config = peft.LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hugging_face(), config)
    theirs = {path.removeprefix("base_model.model.") for path, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    for base in (model, hugging_face()):  # adapters go into any model: transformers' own takes them too
        assert adapters(lora.inject(base, lora.LoraConfig(r=2, target_modules=target_modules))).keys() == theirs


@pytest.mark.parametrize("target_modules", [["proj"], "o_proj", r".*o_pro", ["o_proj."], ["Lm_head"]])
def test_what_peft_finds_nowhere_is_found_nowhere(model, target_modules):
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(hugging_face(), peft.LoraConfig(r=2, target_modules=target_modules))
    assert_refused_unchanged(model, lora.LoraConfig(target_modules=target_modules), "match no linear layer")


def test_each_layer_gets_the_rank_and_scaling_that_peft_gives_it(model):
    patterns = {"rank_pattern": {"layers.0.self_attn.o_proj": 4, ".*mlp.*": 6}, "alpha_pattern": {"o_proj": 3}}
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM", **patterns)
    theirs = peft.get_peft_model(hugging_face(), theirs)
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=5, use_rslora=True, **patterns))
    for path, layer in adapters(model).items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        assert layer.r == other.r["default"]
        assert layer.scaling == other.scaling["default"]


# Slices of fused layers

SLICES = {
    "q_proj": ("self_attn.qkv_proj", (0, 32)),
    "k_proj": ("self_attn.qkv_proj", (32, 48)),
    "v_proj": ("self_attn.qkv_proj", (48, 64)),
    "gate_proj": ("mlp.gate_up_proj", (0, 48)),
    "up_proj": ("mlp.gate_up_proj", (48, 96)),
}


@pytest.mark.parametrize("names", [["q_proj"], ["v_proj", "q_proj"], ["k_proj"], ["gate_proj"], ["up_proj", "k_proj"]])
def test_a_slices_adapter_moves_its_own_outputs_and_no_others(model, names):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before = {path: module(x) for path, module in model.named_modules() if path.endswith(("qkv_proj", "gate_up_proj"))}
    lora.inject(model, lora.LoraConfig(r=2, target_modules=names))
    assert adapters(model).keys() == {f"model.layers.{i}.{SLICES[name][0]}" for i in range(2) for name in names}
    for path, layer in adapters(model).items():
        torch.nn.init.normal_(layer.lora_B)
        moved = (layer(x) != before[path]).all(dim=0)
        expected = torch.zeros_like(moved)
        for fused, (start, stop) in (SLICES[name] for name in names):
            if path.endswith(fused):
                expected[start:stop] = True
        assert torch.equal(moved, expected)


def test_the_cookbooks_list_reaches_every_projection(model):
    lora.inject(model, lora.LoraConfig(target_modules=COOKBOOK))
    layers = adapters(model)
    assert len(layers) == 2 * 4
    assert all(sum(stop - start for start, stop in layer.slices) == layer.out_features for layer in layers.values())


def test_slices_can_be_named_by_path_and_by_pattern(model):
    lora.inject(model, lora.LoraConfig(target_modules=["model.layers.1.self_attn.q_proj"]))
    assert {path: layer.enable_lora for path, layer in adapters(model).items()} == {
        "model.layers.1.self_attn.qkv_proj": [True, False, False]
    }
    model = tiny_model(tiny_config())
    lora.inject(model, lora.LoraConfig(target_modules=r".*\.0\..*\.(q|v)_proj"))
    assert {path: layer.enable_lora for path, layer in adapters(model).items()} == {
        "model.layers.0.self_attn.qkv_proj": [True, False, True]
    }


def test_a_pattern_that_fits_a_fused_layer_means_the_whole_of_it(model):
    lora.inject(model, lora.LoraConfig(target_modules=r".*_proj"))
    assert not any(isinstance(layer, lora.MergedLinear) for layer in adapters(model).values())


def test_a_slice_takes_the_rank_of_its_own_name(model):
    ranks = {"rank_pattern": {"q_proj": 3, "v_proj": 3}, "alpha_pattern": {"q_proj": 6, "v_proj": 6}}
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], **ranks))
    found = {path.rpartition(".")[2]: (layer.r, layer.lora_alpha) for path, layer in adapters(model).items()}
    assert found == {"qkv_proj": (3, 6), "gate_up_proj": (2, 8)}


# What is refused


def test_a_name_that_matches_nothing_is_answered_with_what_there_is(model):
    assert_refused_unchanged(
        model,
        lora.LoraConfig(target_modules=["o_proj", "query", "mlp"]),
        "target_modules ['mlp', 'query'] match no linear layer, embedding or convolution",
        "embed_tokens, qkv_proj (q_proj, k_proj, v_proj), o_proj, gate_up_proj (gate_proj, up_proj), down_proj, lm_head",
    )


def test_a_layer_named_whole_and_by_slice_is_refused(model):
    assert_refused_unchanged(
        model, lora.LoraConfig(target_modules=["qkv_proj", "q_proj"]), "qkv_proj is named whole and by its slices q_proj"
    )


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"v_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}])
def test_slices_of_one_layer_with_unlike_settings_are_refused(model, pattern):
    config = lora.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], **pattern)
    assert_refused_unchanged(model, config, "the slices q_proj, v_proj of model.layers.0.self_attn.qkv_proj must share one r")


def test_all_faults_are_named_at_once(model):
    names = ["gate_up_proj", "up_proj", "nonsense", "q_proj", "v_proj"]
    config = lora.LoraConfig(r=2, target_modules=names, rank_pattern={"v_proj": 4})
    assert_refused_unchanged(model, config, "named whole and by its slices up_proj", "must share one r", "['nonsense'] match no")


def test_a_second_injection_of_one_name_is_refused(model):
    lora.inject(model, lora.LoraConfig(target_modules=["o_proj"]))
    assert_refused_unchanged(model, lora.LoraConfig(target_modules=["down_proj"]), "has an adapter 'default' already")
    assert model.lora_config.target_modules == ["o_proj"]


def test_injection_into_a_model_made_with_adapters_is_refused():
    model = torch.nn.Sequential(lora.Linear(4, 4, r=2), torch.nn.Linear(4, 4))
    assert_refused_unchanged(model, lora.LoraConfig(target_modules=["1"]), "made with adapters already")


# What stays and what comes


@pytest.mark.parametrize("target_modules", [FUSED, COOKBOOK, "all-linear", ["v_proj", "lm_head"]])
def test_injection_keeps_the_models_parameters_and_outputs(model, target_modules):
    before = dict(model.named_parameters())
    ids = torch.arange(12).view(2, 6)
    logits = model(ids)
    assert lora.inject(model, lora.LoraConfig(target_modules=target_modules)) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"lora_A", "lora_B"}
    assert torch.equal(model(ids), logits)


@pytest.mark.parametrize(("dtype", "expected"), [({}, torch.float32), ({"dtype": None}, torch.bfloat16)])
def test_adapters_are_float32_unless_the_weights_own_dtype_is_asked_for(model, dtype, expected):
    lora.inject(model.bfloat16(), lora.LoraConfig(target_modules=["q_proj", "o_proj"]), **dtype)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {expected}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_layers_keep_the_mode_of_those_that_they_replace(model):
    for training in (True, False):
        model = tiny_model(tiny_config()).train(training)
        lora.inject(model, lora.LoraConfig())
        assert {module.training for module in model.modules()} == {training}


def test_settings_reach_every_layer(model):
    lora.inject(model, lora.LoraConfig(r=3, lora_alpha=9, lora_dropout=0.25, target_modules=COOKBOOK))
    for layer in adapters(model).values():
        assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling) == (3, 9, 0.25, 3.0)


# Variants, and modules saved whole


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, lora.Linear),
        ({"use_dora": True}, DoraLinear),
        ({"lora_bias": True}, BiasedLinear),
        ({"init_lora_weights": "olora"}, OffsetLinear),
    ],
)
@pytest.mark.parametrize("target_modules", [["o_proj"], ["q_proj", "up_proj"]])
def test_a_variant_is_injected_as_its_own_layer_and_changes_nothing_at_first(model, settings, kind, target_modules):
    expected = model(IDS)
    layers = adapters(lora.inject(model, lora.LoraConfig(r=2, target_modules=target_modules, **settings)))
    assert all(isinstance(layer, kind) for layer in layers.values())
    assert rms_error(model(IDS), expected) < 1e-6


def test_a_start_from_the_weight_needs_a_rank_that_every_slice_can_have(model):
    config = lora.LoraConfig(r=17, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights="pissa")
    faults = [f"model.layers.{i}.self_attn.qkv_proj starts by pissa and must have r of at most 16, not 17" for i in range(2)]
    assert_refused_unchanged(model, config, *faults)


def test_modules_to_save_are_copies_and_the_base_keeps_its_own(model):
    head, norms = model.lm_head, [layer.input_layernorm for layer in model.model.layers]
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head", "input_layernorm"]))
    for module, original in [
        (model.lm_head, head),
        *zip([layer.input_layernorm for layer in model.model.layers], norms, strict=True),
    ]:
        assert module is not original
        assert module.weight is not original.weight
        assert torch.equal(module.weight, original.weight)


def test_remove_puts_the_modules_to_save_back_too(model):
    before = dict(model.named_modules())
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head", "input_layernorm"]))
    lora.remove(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_variants_are_for_linear_layers(model, settings):
    config = lora.LoraConfig(r=2, target_modules=["o_proj", "embed_tokens"], **settings)
    assert_refused_unchanged(model, config, "are for linear layers, and not for model.embed_tokens")


def test_a_module_to_save_that_is_nowhere_is_refused(model):
    config = lora.LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head", "classifier", "score"])
    assert_refused_unchanged(model, config, "modules_to_save ['classifier', 'score'] match no module")


# Any model


def test_every_target_is_adapted_and_moves_the_output(case):
    model, x, plain, targets = case
    for name in targets:
        assert any(path.endswith(name) or name in ("q_proj", "v_proj") for path in adapters(model)), name
    assert not torch.allclose(logits(model, x), logits(plain, x))
    logits(model, x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name), name


def test_a_model_computes_what_peft_makes_of_it():
    """Not with groups, where PEFT's pair is no change of the weight."""
    targets = ["stem.0", "block.3", "classifier"]
    model = filled(lora.inject(ConvNet().eval(), lora.LoraConfig(r=2, lora_alpha=6, target_modules=targets)))
    plain = ConvNet().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)).eval()
    with torch.no_grad():
        for path, layer in adapters(model).items():
            other = theirs.get_submodule(f"base_model.model.{path}")
            for name in ("lora_A", "lora_B"):
                weight = getattr(other, name)["default"].weight
                weight.copy_(getattr(layer, name).view(weight.shape))
    assert rms_error(model(IMAGES), theirs(IMAGES)) < 1e-5


def test_the_state_dict_is_the_bases_own_and_lora_A_and_lora_B(case):
    model, _, plain, _ = case
    new = model.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= model.state_dict().keys()
    assert new == {f"{path}.{name}" for path in adapters(model) for name in ("lora_A", "lora_B")}
    model.load_state_dict(plain.state_dict(), strict=False)


def test_the_state_dict_outlives_a_file(case, tmp_path):
    model, x, plain, targets = case
    torch.save(model.state_dict(), tmp_path / "all.pt")
    torch.save(lora.lora_state_dict(model), tmp_path / "adapter.pt")
    for file, strict in (("all.pt", True), ("adapter.pt", False)):
        other = lora.inject(copy.deepcopy(plain), lora.LoraConfig(r=2, target_modules=targets))
        other.load_state_dict(torch.load(tmp_path / file), strict=strict)
        assert torch.equal(logits(other, x), logits(model, x))


def test_a_copy_computes_the_same_and_shares_nothing(case):
    model, x, plain, _ = case
    expected, twin = logits(model, x), copy.deepcopy(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.no_grad():
        for parameter in twin.parameters():
            assert parameter.data_ptr() not in own
            parameter.add_(1)
    assert torch.equal(logits(model, x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.sub_(1)
    assert rms_error(logits(lora.remove(twin), x), logits(plain, x)) < 1e-5  # the copy has originals of its own


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_layers_compile_without_a_break(kind):
    torch.manual_seed(0)
    layer, x = {
        "Linear": lambda: (lora.Linear(8, 6, r=2, lora_dropout=0.5), torch.randn(3, 8)),
        "MergedLinear": lambda: (
            lora.MergedLinear(8, 6, r=2, lora_dropout=0.5, enable_lora=[True, False, True]),
            torch.randn(3, 8),
        ),
        "Embedding": lambda: (lora.Embedding(8, 6, r=2), torch.arange(8)),
        "Conv2d": lambda: (lora.Conv2d(3, 6, 3, r=2, lora_dropout=0.5), torch.randn(2, 3, 8, 8)),
    }[kind]()
    filled(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (False, True):
        layer.train(mode)
        found = {}
        for name, function in (("eager", layer), ("compiled", compiled)):
            torch.manual_seed(1)
            y = function(x)
            found[name] = [y, *torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B])]
        for eager, actual in zip(found["eager"], found["compiled"], strict=True):
            assert rms_error(actual, eager) < 1e-6


VARIANTS = {
    "low rank": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
}


def net_with(settings):
    """Two linear layers with adapters of a variant, and a batch for them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6))
    return filled(lora.inject(net, lora.LoraConfig(r=2, target_modules=["0", "2"], **settings))), torch.randn(3, 8)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_compile_without_a_break(settings):
    net, x = net_with(settings)
    factors = [parameter for parameter in net.parameters() if parameter.requires_grad]
    outputs = net(x), torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    found, expected = ([y, *torch.autograd.grad(y.square().sum(), factors)] for y in outputs)
    assert all(rms_error(actual, eager) < 1e-6 for actual, eager in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_compute_in_the_dtype_of_autocast(settings):
    net, x = net_with(settings)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert rms_error(y, net(x)) < 0.03


@pytest.mark.parametrize("name", ["our phi3", "convolutions"])
def test_models_compile_without_a_break(name):
    make, x, target_modules = MODELS[name]
    model = filled(lora.inject(make().eval(), lora.LoraConfig(r=2, target_modules=target_modules)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert rms_error(logits(compiled, x), logits(model, x)) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("targets", [["qkv_proj", "down_proj"], ["qkv_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_the_whole_step_compiles_without_a_break_from_ids_to_loss(targets):
    model = filled(lora.inject(tiny_model(tiny_config(num_hidden_layers=1)), lora.LoraConfig(r=2, target_modules=targets)))
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(250, (2, 12))
    labels = torch.where(torch.rand(2, 12) < 0.4, -100, ids)
    losses = model(ids, labels=labels), torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=labels)
    expected, found = ([loss, *torch.autograd.grad(loss, factors)] for loss in losses)
    assert all(rms_error(actual, eager) < 2e-6 for actual, eager in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["our phi3", "phi3 of transformers"])
def test_models_learn_under_autocast(name):
    """A float32 base computes in bfloat16, and the gradients of its float32 adapters stay float32."""
    make, x, target_modules = MODELS[name]
    model = filled(lora.inject(make().eval(), lora.LoraConfig(r=2, target_modules=target_modules)))
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            y = logits(model, x)
        found[enabled] = [y, *torch.autograd.grad(y.float().square().mean(), factors)]
    assert found[True][0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found[True][1:])
    assert rms_error(found[True][0], found[False][0]) < 0.03
    for actual, exact in zip(found[True][1:], found[False][1:], strict=True):
        assert rms_error(actual, exact) < 0.1


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients(lora_dropout):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    filled(lora.inject(net, lora.LoraConfig(r=2, lora_dropout=lora_dropout, target_modules=["0", "2"])))
    gradients = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        torch.manual_seed(1)
        net.zero_grad()
        run(IMAGES).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == lora.lora_state_dict(net).keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("make", [hugging_face, llama])
def test_the_checkpointing_of_transformers_gives_the_same_gradients(make):
    torch.manual_seed(0)
    model = filled(lora.inject(make().train(), lora.LoraConfig(r=2, lora_dropout=0.5, target_modules=["o_proj", "down_proj"])))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == lora.lora_state_dict(model).keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_layer_that_a_model_uses_twice_stays_one():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    lora.inject(net, lora.LoraConfig(r=2, target_modules=["a"]))
    assert isinstance(net["a"], lora.Linear)
    assert net["b"][1] is net["a"]
    lora.remove(net)
    assert net["a"] is net["b"][1] is shared


def test_hooks_of_the_plain_layer_are_still_called():
    net, seen = nn.Sequential(nn.Linear(4, 4)), []
    net[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    lora.inject(net, lora.LoraConfig(r=2, target_modules=["0"]))(torch.randn(2, 4))
    assert seen == [lora.Linear]


# Layers that an adapter would not reach, or would change


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 5.5


def attention():
    return nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})


def wrapped():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].forward = lambda x: x
    return net


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: nn.Sequential(Scaled(9, 4)), "0", "0 cannot take an adapter: Scaled computes in a way of its own"),
        (wrapped, "0", "0 cannot take an adapter: Linear computes in a way of its own"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "0", "computed from other parameters"),
        (attention, "out_proj", "attention.out_proj cannot take an adapter: nn.MultiheadAttention reads its weight"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), "linear1", "set_fastpath_enabled(False)"),
        (lambda: nn.Linear(4, 4), "all-linear", "it is the model itself"),
    ],
)
def test_what_an_adapter_would_not_reach_or_would_change_is_refused(make, name, message):
    target_modules = name if name == "all-linear" else [name]
    assert_refused_unchanged(make(), lora.LoraConfig(r=2, target_modules=target_modules), message)


def test_an_encoder_layer_takes_adapters_once_its_fast_path_is_off():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval(), torch.randn(2, 3, 4)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        filled(lora.inject(model, lora.LoraConfig(r=2, target_modules=["linear1", "linear2"])))
        with torch.no_grad():
            quick = model(x)
        assert rms_error(quick, model(x)) < 1e-6
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# remove


def test_remove_gives_back_the_untouched_modules(case):
    _, x, plain, targets = case
    modules, parameters, expected = dict(plain.named_modules()), dict(plain.named_parameters()), logits(plain, x)
    before = copy.deepcopy(plain.state_dict())
    filled(lora.inject(plain, lora.LoraConfig(r=2, target_modules=targets)))
    logits(plain.train(), x).square().sum().backward()
    plain.eval()
    plain.load_state_dict(before, strict=False)  # the running statistics of BatchNorm
    assert lora.remove(plain) is plain
    assert all(module is modules.pop(path) for path, module in plain.named_modules())
    assert all(parameter is parameters.pop(name) for name, parameter in plain.named_parameters())
    assert not modules
    assert not parameters
    assert torch.equal(logits(plain, x), expected)
    assert not hasattr(plain, "lora_config")
    lora.inject(plain, lora.LoraConfig(r=2, target_modules=targets))  # another may follow


def test_remove_gives_the_original_the_present_parameters_and_mode():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4)).eval()
    plain = net[0]
    lora.inject(net, lora.LoraConfig(r=2, target_modules=["0"])).to_empty(device="cpu").train()
    weight = net[0].weight
    assert weight is not plain.weight  # to_empty makes new ones
    assert lora.remove(net)[0] is plain
    assert plain.weight is weight
    assert plain.training


def test_remove_refuses_what_it_cannot_undo():
    with pytest.raises(ValueError, match="the model has no adapter to remove"):
        lora.remove(nn.Sequential(nn.Linear(4, 4)))
    net = nn.Sequential(nn.Linear(4, 4), lora.Linear(4, 4, r=2))
    with pytest.raises(ValueError, match="1 was made with its adapter, not by inject"):
        lora.remove(net)
    net = lora.inject(nn.Sequential(nn.Linear(4, 4)), lora.LoraConfig(r=2, target_modules=["0"]))
    lora.merge(net)
    with pytest.raises(ValueError, match="0 is merged: unmerge it first"):
        lora.remove(net)
    assert net[0].merged


# Phi-3-mini


def test_phi3_mini_has_the_published_counts():
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config())
    assert count_parameters(model)[1] == 3_821_079_552
    lora.inject(model, lora.LoraConfig(r=16, target_modules=FUSED))
    lora.mark_only_lora_as_trainable(model)
    assert count_parameters(model) == (25_165_824, 3_821_079_552 + 25_165_824)
