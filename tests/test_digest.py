"""A digest tells apart what computes differently, and nothing else."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys

import torch

import nextn
from conftest import make_host, with_lora
from nextn.digest import code_of, structure_of, weights_of


def doubled(_module, _args, output):
    return output * 2


def tripled(_module, _args, output):
    return output * 3


def patched(host, function):
    host.model.layers[0].mlp.forward = functools.partial(function, host.model.layers[0].mlp)
    return host


def changed(host, **attributes):
    for name, value in attributes.items():
        setattr(host.model.layers[1].self_attn, name, value)
    return host


def hooked(host, hook):
    host.model.norm.register_forward_hook(hook)
    return host


CHANGES = {
    "none": lambda host: host,
    "a number": lambda host: changed(host, scaling=0.25),
    "a dtype": lambda host: changed(host, kind=torch.float16),
    "another dtype": lambda host: changed(host, kind=torch.bfloat16),
    "a set": lambda host: changed(host, kind={"a", "b"}),
    "an object in a dict": lambda host: changed(host, kind={"a": 1, "b": object()}),
    "another dict": lambda host: changed(host, kind={"a": 2, "b": object()}),
    "a tensor outside the buffers": lambda host: changed(host, kind=torch.ones(2)),
    "another tensor": lambda host: changed(host, kind=torch.zeros(2)),
    "an adapter": with_lora,
    "a scaled adapter": lambda host: with_lora(host, 2.0),
    "a disabled adapter": lambda host: with_lora(host, enabled=False),
    "a hook": lambda host: hooked(host, doubled),
    "another hook": lambda host: hooked(host, tripled),
    "a forward of its own": lambda host: patched(host, lambda mlp, states: mlp.down_proj(mlp.up_proj(states))),
    "another forward": lambda host: patched(host, lambda mlp, states: mlp.up_proj(mlp.down_proj(states))),
    "a function": lambda host: changed(host, kind=torch.nn.functional.gelu),
    "another function": lambda host: changed(host, kind=torch.relu),
    "an activation": lambda host: setattr(host.model.layers[0].mlp, "act_fn", torch.nn.GELU()) or host,
    "a setting of a config": lambda host: setattr(host.model.config, "sliding_window", 5) or host,
}


def test_settings_adapters_hooks_and_replaced_forwards_count():
    digests = {name: structure_of(change(make_host("llama"))) for name, change in CHANGES.items()}
    assert len(set(digests.values())) == len(digests)


def test_where_a_model_comes_from_and_how_it_generates_does_not_count(tmp_path):
    host = make_host("llama")
    before = structure_of(host), weights_of(host)
    host.config._name_or_path = host.name_or_path = str(tmp_path)
    host.generation_config.max_length = 7
    handle = host.model.norm.register_forward_hook(doubled)  # its number is another one next time
    hooked_once = structure_of(host)
    handle.remove()
    assert (structure_of(host), weights_of(host)) == before
    assert structure_of(hooked(host, doubled)) == hooked_once
    assert structure_of(copy.deepcopy(host)) == hooked_once


def test_weights_count_as_they_are_in_memory():
    host = make_host("llama")
    digests = {weights_of(host)}
    host.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    digests.add(weights_of(host))
    host.model.rotary_emb.inv_freq.mul_(2)
    digests.add(weights_of(host))
    digests.add(weights_of(host.bfloat16()))
    assert len(digests) == 4


def test_another_process_finds_the_same_digest():
    code = "from conftest import make_host; from nextn.digest import *; print(structure_of(make_host('gemma3')))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == structure_of(make_host("gemma3"))


def test_what_a_trimmed_output_has_gathered_does_not_count():
    output = {"kind": "trimmed", "size": 40}
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True, output=output)).eval()
    before = structure_of(model.heads)
    ((_, result),) = model.engine(stop_tokens=[]).generate([[5, 9, 11]], 5)
    assert len(result.tokens) == 5 and model.heads.output._gathered.rows is not None
    assert structure_of(model.heads) == before


def test_the_source_of_what_a_module_imports_counts(tmp_path, monkeypatch):
    package = tmp_path / "somebodys_model"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("def scale(x): return x * 2\n")
    (package / "model.py").write_text("from somebodys_model.helper import scale\n")
    monkeypatch.syspath_prepend(tmp_path)
    digests = set()
    for factor in (2, 2, 3):
        (package / "helper.py").write_text(f"def scale(x): return x * {factor}\n")
        from nextn import digest

        digest._with_imports.cache_clear()
        digest._source.cache_clear()
        __import__("somebodys_model.model")
        digests.add(code_of(["somebodys_model.model"]))
    assert len(digests) == 2
