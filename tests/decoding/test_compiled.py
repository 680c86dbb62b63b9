"""Machine code gives what the eager step gives, is compiled once, and nothing breaks where it cannot be compiled."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

import nextn
from conftest import CONFIGS, KINDS, MORE_KINDS, made_up_text, make_host, with_lora
from nextn.config import OutputConfig
from nextn.decoding import building
from nextn.decoding.compiled import _in_memory, _loaded, compiled, key, on_stderr, recall, remember
from nextn.decoding.engine import Engine
from nextn.decoding.pace import Profile
from nextn.decoding.sampling import keys
from nextn.decoding.verify import Draw, Verify
from nextn.store import Store
from nextn.trunk import Trunk


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXTN_CACHE", str(tmp_path))
    return tmp_path


def decoded(engine: Engine, prompts) -> list[tuple[list[int], list[int]]]:
    done = sorted(engine.generate(prompts, 24), key=lambda item: item[0])
    return [(result.tokens, result.accepted) for _, result in done]


def compiles_to_the_same(model, rows: int) -> None:
    prompts = [made_up_text(1, length, seed=length)[0].tolist() for length in (5, model.multi_token.n, 9, 70)]
    compiling = []
    engine = model.engine(rows=rows).compile(lambda message: compiling.append(message) or torch.no_grad())
    assert engine.code and compiling
    assert decoded(engine, prompts) == decoded(model.engine(rows=rows), prompts)
    again = model.engine(rows=rows).compile(lambda message: pytest.fail(f"compiled a second time: {message}"))
    assert decoded(again, prompts) == decoded(engine, prompts)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@needs_compiler
def test_compiled_heads_give_the_eager_text_and_acceptance(trained_host, cache):
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS["recurrent"])
    compiles_to_the_same(nextn.attach(copy.deepcopy(trained_host), config).eval(), rows=2)


@needs_compiler
def test_what_a_gpu_runs_is_compiled_once_and_gives_the_eager_text(trained_host, cache, monkeypatch):
    """All of it but the CUDA graph, on a CPU."""
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS["recurrent"])
    model = nextn.attach(copy.deepcopy(trained_host), config).eval()
    monkeypatch.setattr(building, "compiled", lambda module, inputs, _progress: _in_memory(module, inputs))
    engine = model.engine(rows=2).compile()
    assert engine.code and engine.code.padding == 0
    prompts = [made_up_text(1, length, seed=length)[0].tolist() for length in (5, 4, 9, 70)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert decoded(engine, prompts) == decoded(model.engine(rows=2), prompts)
        assert decoded(engine, prompts[:1]) == decoded(model.engine(rows=2), prompts[:1])  # and with other caches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_graphs_give_the_eager_text(trained_host):
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS["recurrent"])
    model = nextn.attach(copy.deepcopy(trained_host).to("cuda"), config).eval()
    prompts = [made_up_text(1, length, seed=length)[0].tolist() for length in (5, 4, 9, 70)]
    engine = model.engine(rows=2).compile()
    assert engine.code and engine.overlaps
    for _ in range(2):  # with graphs of these caches there already
        assert decoded(engine, prompts) == decoded(model.engine(rows=2), prompts)


@pytest.mark.slow
@needs_compiler
def test_compiled_sampling_and_depths_give_the_eager_text(trained_host, cache):
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS["recurrent"])
    model = nextn.attach(copy.deepcopy(trained_host), config).eval()
    prompts = [made_up_text(1, length, seed=length)[0].tolist() for length in (5, 9, 40)]
    engine = model.engine(rows=2, depth="auto", stop_tokens=[]).compile(sampling=True)
    assert engine.code and engine.code.depths == (0, 1, 3) and len(engine.code.score) == len(engine.code.verify)
    assert set(engine.code.noisy_drafts) == {1, 3} and engine.code.draw is not None
    for settings in ({}, {"temperature": 1.0, "top_k": 20}, {"repetition_penalty": 1.3}):
        sampling = nextn.Sampling(**settings, seed=2)
        expected = dict(model.engine(heads=1, stop_tokens=[]).generate(prompts, 24, sampling=sampling))
        for depth in ("auto", 1, 3):
            engine.depth = depth
            found = dict(engine.generate(prompts, 24, sampling=sampling))
            assert [found[row].tokens for row in range(3)] == [expected[row].tokens for row in range(3)]
            if depth != "auto":
                assert set(engine.steps) == {depth}
                eager = dict(model.engine(rows=2, depth=depth, stop_tokens=[]).generate(prompts, 24, sampling=sampling))
                assert [found[row].accepted for row in range(3)] == [eager[row].accepted for row in range(3)]
    each = [nextn.Sampling(), nextn.Sampling(temperature=1.0, seed=3), nextn.Sampling(temperature=0.7, seed=4)]
    expected = dict(model.engine(heads=1, stop_tokens=[]).generate(prompts, 24, sampling=each))
    found = dict(engine.generate(prompts, 24, sampling=each))
    assert [found[row].tokens for row in range(3)] == [expected[row].tokens for row in range(3)]
    what_is_drawn_is_the_same(engine.code.draw, model.trunk.vocab_size)


@needs_compiler
def test_what_draws_takes_logits_and_scores_alike(trained_host, cache):
    engine = Engine(Trunk(copy.deepcopy(trained_host).bfloat16()), None)
    draw = building._draw(engine, on_stderr)
    assert draw is not None
    for dtype in (torch.bfloat16, torch.float32):
        what_is_drawn_is_the_same(draw, engine.trunk.vocab_size, dtype)


def what_is_drawn_is_the_same(draw, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
    scores = torch.randn(200, vocab_size, generator=torch.Generator().manual_seed(0)) * 4
    scores[:50, ::2], scores[50, 3], scores[51], scores[52, 5] = -torch.inf, torch.nan, -torch.inf, torch.inf
    key, scores = keys(torch.arange(10), torch.arange(20).expand(10, -1)).flatten(), scores.to(dtype)
    temperatures = torch.tensor([1.0, 0.7]).repeat(100)
    expected = [int(Draw()(*each)) for each in zip(scores, temperatures, key, strict=True)]
    assert [int(draw(*each)) for each in zip(scores, temperatures, key, strict=True)] == expected
    assert expected[50] == expected[51] == -1 and expected[52] == 5 and all(token % 2 for token in expected[:50])


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("family", CONFIGS)
def test_every_host_compiles(family, cache):
    model = nextn.attach(make_host(family), nextn.MultiTokenConfig(n=3, **KINDS["recurrent"])).eval()
    compiles_to_the_same(model, rows=1)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "stated", ["separate", "low_rank:16", "trimmed:40,own", "clustered:16:4", "clustered:16:4,own"]
)
def test_every_output_compiles(stated, trained_host, cache):
    config = nextn.MultiTokenConfig(n=3, output=OutputConfig.parse(stated), **KINDS["recurrent"])
    compiles_to_the_same(nextn.attach(copy.deepcopy(trained_host), config).eval(), rows=2)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["distinct", "parallel", "linear"])
def test_every_kind_compiles(kind, trained_host, cache):
    model = nextn.attach(copy.deepcopy(trained_host), nextn.MultiTokenConfig(n=4, **MORE_KINDS[kind])).eval()
    compiles_to_the_same(model, rows=2)


@pytest.mark.slow
@needs_compiler
def test_compiled_generation_notices_changed_weights(trained_host, cache):
    model = nextn.attach(copy.deepcopy(trained_host), nextn.MultiTokenConfig(n=2, **KINDS["recurrent"])).eval()
    prompt = made_up_text(1, 9, seed=1)
    before = model.generate(prompt, max_new_tokens=12, compile=True)
    assert torch.equal(before, model.generate(prompt, max_new_tokens=12))
    with torch.no_grad():
        model.trunk.unembedding.weight.copy_(model.trunk.unembedding.weight.roll(1, dims=0))
    after = model.generate(prompt, max_new_tokens=12, compile=True)
    assert torch.equal(after, model.generate(prompt, max_new_tokens=12))
    assert not torch.equal(after, before)


def test_without_a_compiler_it_runs_eagerly_and_says_so(trained_model, prompts, cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = trained_model.engine().compile()
    assert engine.code is None
    assert "The engine runs eagerly: there is no C++ compiler (no-such-compiler)" in caplog.text
    assert decoded(engine, prompts) == decoded(trained_model.engine(), prompts)


class Double(torch.nn.Module):
    """Little to compile."""

    def forward(self, numbers):
        return (numbers * 2,)


def damaged_is_compiled_anew(cache, caplog) -> None:
    module, inputs = Double(), (torch.randn(61),)
    compiled(module, inputs)
    (path,) = (cache / "compiled").iterdir()
    assert path.name.startswith(f"double-{key(module, inputs)}.")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    _loaded.clear()
    compiling = []
    again = compiled(module, inputs, lambda message: compiling.append(message) or torch.no_grad())
    assert len(compiling) == 1 and f"{path} is damaged and is removed" in caplog.text
    assert torch.equal(again(*inputs)[0], inputs[0] * 2)
    compiled(module, inputs, lambda message: pytest.fail(f"compiled a third time: {message}"))
    assert len(list((cache / "compiled").iterdir())) == 1, "nothing of the compiler's own stays"


def test_a_damaged_package_is_removed_named_and_compiled_anew(cache, caplog, monkeypatch):
    """With a compiler and a loader that only pretend."""

    class Loaded:
        loader = SimpleNamespace(run=lambda inputs: Double()(*inputs))

    def write(_module, _inputs, path) -> None:
        (path.parent / "kernel.cpp").write_text("the compiler's own")
        path.write_bytes(b"a package" * 100)

    monkeypatch.setattr("nextn.decoding.compiled._package", write)
    monkeypatch.setattr("nextn.decoding.compiled._load", lambda path: Loaded())
    monkeypatch.setattr("nextn.decoding.compiled.require_compiler", lambda: None)
    damaged_is_compiled_anew(cache, caplog)


@pytest.mark.slow
@needs_compiler
def test_a_damaged_package_of_the_real_compiler_is_compiled_anew(cache, caplog):
    damaged_is_compiled_anew(cache, caplog)


def test_a_package_that_is_intact_and_cannot_be_loaded_is_named(trained_host, cache, caplog):
    engine = Engine(Trunk(trained_host), None)
    with torch.no_grad():
        inputs = building.example(engine, 0)
    packages, name = Store(cache / "compiled", ".pt2"), f"verify-{key(Verify(engine.trunk, engine.tap), inputs)}"
    packages.put(name, b"of another PyTorch")
    assert engine.compile().code is None
    assert f"{packages.get(name)} cannot be loaded" in caplog.text


def test_a_damaged_package_that_cannot_be_removed_is_one_sentence(trained_host, cache, caplog, monkeypatch):
    engine = Engine(Trunk(trained_host), None)
    with torch.no_grad():
        name = f"verify-{key(Verify(engine.trunk, engine.tap), building.example(engine, 0))}"
    packages = Store(cache / "compiled", ".pt2")
    packages.put(name, b"intact")
    path = packages.get(name)
    path.write_bytes(b"damaged")

    def unlink(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "unlink", unlink)
    assert engine.compile().code is None
    assert f"{cache / 'compiled'} cannot be used" in caplog.text and "Permission denied" in caplog.text
    assert "is removed" not in caplog.text and path.exists()


def test_a_compile_that_another_host_has_begun_is_waited_for_and_named(trained_host, cache, caplog, monkeypatch):
    monkeypatch.setattr("nextn.store.WAIT", 0.1)
    engine = Engine(Trunk(trained_host), None)
    with torch.no_grad():
        name = f"verify-{key(Verify(engine.trunk, engine.tap), building.example(engine, 0))}"
    (cache / "compiled").mkdir()
    (cache / "compiled" / f"{name}.lock").write_text("")
    monkeypatch.setattr("nextn.decoding.compiled.require_compiler", lambda: None)
    assert engine.compile().code is None
    assert f"{name} is in use by another process" in caplog.text


def test_numbers_that_were_measured_are_kept_and_checked(cache):
    assert recall("padding-x") is None
    remember("padding-x", 3)
    remember("padding-x", 0)
    assert recall("padding-x") == 0
    (path,) = (cache / "compiled").iterdir()
    path.write_text("7")
    assert recall("padding-x") is None


def test_a_profile_is_kept_checked_and_of_one_set_of_adapters(trained_host, cache, monkeypatch):
    profiles, profile = Store(cache, ".json"), Profile({0: 1.0, 3: 1.5}, drawn=1.25)
    profile.write(profiles, "name")
    assert Profile.read(profiles, "name") == profile
    profiles.get("name").write_text(profiles.get("name").read_text().replace("1.5", "9.5"))
    assert Profile.read(profiles, "name") is None
    hosts = [trained_host, *(with_lora(copy.deepcopy(trained_host), enabled=enabled) for enabled in (True, False))]
    names = [building._profile_name(Engine(Trunk(host), None), 1) for host in hosts]
    assert names[0] == building._profile_name(Engine(Trunk(copy.deepcopy(trained_host)), None), 1)
    assert len(set(names)) == 3


def test_the_key_tells_apart_what_compiles_differently(trained_host):
    def key_of(host, padding: int = 0, tap: str = "post_norm") -> str:
        engine = Engine(Trunk(host), None)
        with torch.no_grad():
            inputs = building.example(engine, 0, padding)
        return key(Verify(engine.trunk, tap), inputs)

    other = copy.deepcopy(trained_host)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    faster = copy.deepcopy(trained_host)
    faster.model.rotary_emb.inv_freq.mul_(2)
    windowed = copy.deepcopy(trained_host)
    windowed.config.sliding_window = 5
    adapted = with_lora(copy.deepcopy(trained_host))
    disabled = with_lora(copy.deepcopy(trained_host), enabled=False)
    hooked = copy.deepcopy(trained_host)
    hooked.model.norm.register_forward_hook(lambda _module, _args, output: output * 2)
    patched = copy.deepcopy(trained_host)
    patched.model.layers[0].mlp.forward = lambda states: states
    keys = [
        key_of(trained_host),
        key_of(faster),
        key_of(windowed),
        key_of(other),
        key_of(adapted),
        key_of(disabled),
        key_of(hooked),
        key_of(patched),
        key_of(copy.deepcopy(trained_host).bfloat16()),
        key_of(trained_host, padding=3),
        key_of(trained_host, tap="pre_norm"),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(copy.deepcopy(trained_host)) == keys[0]
    at_one = torch.ones(()), torch.zeros((), dtype=torch.long)
    assert key(Draw(), (torch.zeros(61), *at_one)) != key(Draw(), (torch.zeros(61, dtype=torch.bfloat16), *at_one))


@pytest.mark.parametrize("padding", [1, 3])
def test_padding_changes_nothing(trained_host, prompts, padding):
    engine, padded = (Engine(Trunk(trained_host), None, rows=2) for _ in range(2))
    padded.padding = padding
    assert decoded(padded, prompts) == decoded(engine, prompts)
