"""Private interfaces of PyTorch: each does what biofx relies on, and only one file uses them."""

import ast
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from biofx.base import torch_internals as internals

READ_IN_PLACE = {
    nn.Module: (
        *("_parameters", "_buffers", "_modules", "_load_from_state_dict", "_load_state_dict_pre_hooks"),
        *internals.HOOKS,
    ),
    lambda: nn.RNN(1, 1): ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_weights_have_changed"),
    lambda: fx.symbolic_trace(nn.Identity()): ("_code", "_graph", "_tracer_cls"),
    lambda: torch.compile(nn.Identity()): ("_orig_mod",),
    lambda: torch.zeros(1): ("_version", "_base"),
    lambda: nn.Linear(1, 1).state_dict(): ("_metadata",),
}
"""Private attributes that are the state or the protocol of what biofx rewrites: everywhere, and with no public name."""

NOT_OF_TORCH = {"_biofx_class", "_biofx_keys", "_fields", "_replace", "_value_"}


@pytest.mark.parametrize("make", READ_IN_PLACE, ids=lambda make: READ_IN_PLACE[make][0])
def test_attributes_that_are_read_in_place_exist(make):
    assert [name for name in READ_IN_PLACE[make] if not hasattr(make(), name)] == []


def test_operators_on_many_tensors_exist():
    """`torch._foreach_*` is documented under its private name, and stays where it is called."""
    used = {name for tree in sources().values() for name in attributes(tree)}
    names = {name for name in used if name.startswith("_foreach_")}
    assert len(names) > 20
    assert [name for name in names if not hasattr(torch, name)] == []


def test_one_file_imports_private_names_of_torch():
    assert [(path.name, name) for path, tree in sources().items() for name in private_imports(tree)] == []


def test_one_file_reads_private_attributes_of_torch():
    known = {name for names in READ_IN_PLACE.values() for name in names} | NOT_OF_TORCH
    for path, tree in sources().items():
        others = {name for name in attributes(tree) if is_private(name)} - own_names(tree) - known
        assert [name for name in others if not name.startswith("_foreach_")] == [], path


def test_every_internal_has_a_test_of_its_name():
    made_here = {
        name for name, value in vars(internals).items() if getattr(value, "__module__", "") == internals.__name__
    }
    constants = {name for name in vars(internals) if name.isupper()}
    expected = {f"test_{name.lower()}" for name in {*internals.__all__, *made_here, *constants}}
    assert expected - set(globals()) == set()


@cache
def sources():
    """The syntax of each file of biofx but the one for private interfaces."""
    folders = (Path(biofx.__file__).parent, Path(passes.__file__).parent)
    paths = {path.resolve() for folder in folders for path in folder.rglob("*.py")} - {
        Path(internals.__file__).resolve()
    }
    return {path: ast.parse(path.read_text()) for path in sorted(paths)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_imports(tree):
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith("torch") and any(map(is_private, name.split("."))))


def attributes(tree):
    """The names of all attributes that a file reads or writes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            yield from (name.value for name in node.args[1:2] if isinstance(name, ast.Constant))


def own_names(tree):
    """The names that a file defines: functions, fields, and attributes that its classes set on themselves."""
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    fields = {node.id for node in stored if isinstance(node, ast.Name)}
    of_self = {n.attr for n in stored if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}
    return functions | fields | of_self


# --- classes and functions of torch -----------------------------------------------------------------------------------


def test_pytree():
    tree = {"a": [torch.zeros(1), 2], "b": (3,)}
    leaves, structure = internals.pytree.tree_flatten(tree)
    assert internals.pytree.tree_unflatten(leaves, structure) == tree
    assert internals.pytree.tree_leaves(tree) == leaves
    assert internals.pytree.tree_map_only(int, lambda n: n + 1, tree)["b"] == (4,)
    assert internals.pytree.tree_map(type, tree)["b"] == (int,)
    assert {dict, list, tuple} <= set(internals.pytree.SUPPORTED_NODES)
    assert callable(internals.pytree.register_pytree_node)


def test_torchdispatchmode():
    class Noting(internals.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    with Noting():
        torch.zeros(1).neg()
    assert seen[-1] is torch.ops.aten.neg.default


def test_is_fake():
    fake = FakeTensorMode().from_tensor(torch.zeros(2))
    seen = []
    torch.func.grad(lambda x: seen.append(x) or x.sum())(fake)
    assert internals.is_fake(fake)
    assert internals.is_fake(seen[0])
    assert not internals.is_fake(torch.zeros(2))


def test_is_traceable_wrapper_subclass():
    assert internals.is_traceable_wrapper_subclass(TwoTensor(torch.zeros(1), torch.zeros(1)))
    assert not internals.is_traceable_wrapper_subclass(nn.Parameter(torch.zeros(1)))


def test_opoverload():
    assert isinstance(torch.ops.aten.neg.default, internals.OpOverload)


def test_higherorderoperator():
    assert isinstance(torch.ops.higher_order.cond, internals.HigherOrderOperator)


def test_hookwithmodule():
    module = nn.Identity()
    module.register_state_dict_pre_hook(print)
    module.register_load_state_dict_pre_hook(repr)
    (hook,) = module._load_state_dict_pre_hooks.values()
    assert isinstance(hook, internals.HookWithModule)
    assert (hook.hook, hook.with_module) == (repr, True)


def test_weightnormparametrization():
    (computed,) = parametrizations.weight_norm(nn.Linear(2, 2)).parametrizations.weight
    assert isinstance(computed, internals.WeightNormParametrization)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_weightnorm():
    (hook,) = nn.utils.weight_norm(nn.Linear(2, 2))._forward_pre_hooks.values()
    assert isinstance(hook, internals.WeightNorm)
    assert hook.name == "weight"


def test_spectralnorm():
    (hook,) = nn.utils.spectral_norm(nn.Linear(2, 2))._forward_pre_hooks.values()
    assert isinstance(hook, internals.SpectralNorm)
    assert hook.name == "weight"


def test_checkpointfunction(monkeypatch):
    calls = []
    monkeypatch.setattr(internals.CheckpointFunction, "apply", lambda *args: calls.append(args))
    checkpoint(torch.neg, torch.zeros(1, requires_grad=True), use_reentrant=True)
    assert len(calls) == 1


def test_weaktensorkeydictionary():
    tensor = torch.zeros(2)
    known = internals.WeakTensorKeyDictionary({tensor: 1})
    assert known[tensor] == 1
    assert torch.zeros(2) not in known
    del tensor
    assert len(known) == 0


def test_storageweakref():
    tensor = torch.zeros(1)
    reference = internals.StorageWeakRef(tensor.untyped_storage())
    view = tensor.view(1)
    del tensor
    assert not reference.expired()
    del view
    assert reference.expired()


def test_reduce_graph_module():
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    _, (attributes, imports) = traced.__reduce__()
    rebuilt = internals.reduce_graph_module(attributes, imports)
    assert str(rebuilt.graph) == str(traced.graph)
    assert pickle.loads(pickle.dumps(attributes)).keys() == attributes.keys()


# --- registries -------------------------------------------------------------------------------------------------------


def test_hooks():
    module = nn.Identity()
    module.register_forward_hook(print)
    module.register_forward_pre_hook(print)
    module.register_full_backward_hook(print)
    module.register_full_backward_pre_hook(print)
    assert [len(getattr(module, registry)) for registry in internals.HOOKS] == [1, 1, 1, 1]


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_has_hooks(register):
    parameter = nn.Parameter(torch.zeros(1))
    assert not internals.has_hooks(parameter)
    handle = getattr(parameter, register)(print)
    assert internals.has_hooks(parameter)
    handle.remove()
    assert not internals.has_hooks(parameter)


def test_global_hooks():
    modules = nn.modules.module
    handles = [
        modules.register_module_forward_hook(print),
        modules.register_module_forward_pre_hook(print),
        modules.register_module_full_backward_hook(print),
        modules.register_module_full_backward_pre_hook(print),
    ]
    found = [len(registry) for registry in internals.GLOBAL_HOOKS]
    for handle in handles:
        handle.remove()
    assert found == [1, 1, 1, 1]
    assert not any(internals.GLOBAL_HOOKS)


def test_has_global_hooks():
    handle = nn.modules.module.register_module_forward_hook(print)
    assert internals.has_global_hooks()
    handle.remove()
    assert not internals.has_global_hooks()


def test_derived():
    layer = nn.LSTM(1, 1)
    layer.compile(backend="eager")
    assert set(internals.DERIVED) <= set(vars(layer))


def test_no_torch_function():
    class Weight(torch.Tensor):
        __torch_function__ = internals.NO_TORCH_FUNCTION

    assert type(torch.zeros(1).as_subclass(Weight) + 1) is torch.Tensor


# --- what intercepts operators ----------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Operators(internals.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_is_intercepted():
    def seen(x):
        found.append(internals.is_intercepted())
        return x

    found = []
    torch.func.vmap(seen)(torch.zeros(1))
    for mode in (Functions(), Operators()):
        with mode:
            seen(0)
    seen(0)
    assert found == [True, True, True, False]


def test_is_transformed_by_functions():
    def seen(x):
        found.append(internals.is_transformed_by_functions())
        return x.sum()

    found = []
    torch.func.grad(seen)(torch.zeros(1))
    with Operators():
        seen(torch.zeros(1))
    assert found == [True, False]


def test_saves_by_hooks():
    assert not internals.saves_by_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert internals.saves_by_hooks()


def test_runs_backward():
    found = []
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda gradient: found.append(internals.runs_backward()))
    x.neg().backward()
    assert (found, internals.runs_backward()) == ([True], False)


def test_below_autograd():
    x = torch.ones(1, requires_grad=True)
    with torch.autograd.forward_ad.dual_level(), internals.below_autograd():
        y = torch.autograd.forward_ad.make_dual(torch.ones(1), torch.ones(1)) * 2
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is None
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_without_dispatch_modes():
    class Refusing(internals.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    with Refusing(), internals.without_dispatch_modes():
        assert torch.get_rng_state().numel()


@pytest.mark.parametrize(("transform", "dimension"), [(torch.func.vmap, 0), (torch.func.grad, None)])
def test_below_transform(transform, dimension):
    def seen(x):
        with internals.below_transform(x) as ((inner, axis),):
            found.extend([internals.is_transformed_by_functions(), inner.shape, axis])
        return x.sum()

    found = []
    transform(seen)(torch.zeros(3))
    assert found == [False, (3,), dimension]


# --- operators --------------------------------------------------------------------------------------------------------


def test_qualified_name():
    assert internals.qualified_name(torch.ops.biofx.scale_grad) == "biofx::scale_grad"
    assert internals.qualified_name(torch.relu) is None


def test_schema_of():
    schema = internals.schema_of(torch.ops.aten.add_.Tensor)
    assert (schema.name, schema.is_mutable) == ("aten::add_", True)
    first, _, last = schema.arguments
    assert (first.name, str(first.type), first.alias_info.is_write) == ("self", "Tensor", True)
    assert (last.has_default_value(), last.default_value) == (True, 1)
    assert schema.returns[0].alias_info.is_write
    assert internals.schema_of(torch.relu) is None


def test_parsed_schema():
    parsed = internals.parsed_schema("some_grad(Tensor(a) weight, float share) -> Tensor(a)")
    assert parsed.name == "some_grad"
    assert [(a.name, str(a.type)) for a in parsed.arguments] == [("weight", "Tensor"), ("share", "float")]


def test_call_untraced(monkeypatch):
    operator = torch.ops.aten.neg.default
    monkeypatch.setattr(internals.OpOverload, "__call__", lambda *args, **kwargs: pytest.fail("it was seen"))
    assert internals.call_untraced(operator, (torch.ones(()),), {}) == -1


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_wrapper_under_way():
    found = []

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self):  # without processes
            nn.Module.__init__(self)
            self.module = nn.Identity()
            self._use_python_reducer = False

    wrapper = Wrapper()
    wrapper.module.register_forward_pre_hook(lambda *_: found.append(internals.wrapper_under_way()))
    wrapper._run_ddp_forward(torch.ones(1))
    assert found == [wrapper]
    assert internals.wrapper_under_way() is None


def test_steps_under_way():
    class Inner(torch.optim.SGD):
        pass

    class Outer(Inner):
        def step(self, closure=None):
            super().step(closure)

    counts = []
    for kind in (Inner, Outer):
        optimizer = kind([torch.zeros(1, requires_grad=True)], lr=1.0)
        step = optimizer.step
        optimizer.register_step_pre_hook(lambda optimizer, *_: counts.append(internals.steps_under_way(optimizer)))
        step()
        assert internals.steps_under_way(optimizer) == 0
    assert counts == [1, 1, 2]


def test_run_hooks_next_to_step():
    optimizer, order = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: order.append("other"))
    hooks = [
        register(lambda *_, name=name: order.append(name))
        for register, name in (
            (optimizer.register_step_pre_hook, "before"),
            (optimizer.register_step_post_hook, "after"),
        )
    ]
    optimizer.register_step_pre_hook(lambda *_: order.append("other"))
    internals.run_hooks_next_to_step(optimizer, *hooks)
    optimizer.step()
    assert order == ["other", "before", "after", "other"]


def test_runs_function_modes():
    assert not internals.runs_function_modes()
    with torch.device("meta"):
        assert internals.runs_function_modes()


def test_has_memory():
    seen = []
    assert internals.has_memory(torch.zeros(2))
    assert not internals.has_memory(torch._efficientzerotensor(2))
    torch.vmap(lambda x: (seen.append(internals.has_memory(x)), x)[1])(torch.ones(2))
    assert seen == [False]


def test_asked_of_leaves():
    leaf = nn.Parameter(torch.ones(2))
    of_leaf, of_part = ({name: getattr(x, name) for name in internals.ASKED_OF_LEAVES} for x in (leaf, leaf[:1]))
    assert of_leaf.pop("_is_view")() is False
    assert of_leaf == {"is_leaf": True, "grad_fn": None, "_base": None}
    assert of_part.pop("_is_view")() is True
    assert of_part.pop("_base") is leaf
    assert of_part.pop("grad_fn") is not None
    assert of_part == {"is_leaf": False}


def test_version():
    tensor = torch.ones(2)
    before = internals.VERSION(tensor)
    tensor.add_(1)
    assert internals.VERSION(tensor) > before


def test_memory_of():
    a, b = torch.zeros(0), torch.zeros(0)
    assert internals.memory_of(a) == internals.memory_of(a.view(0)) != internals.memory_of(b)


def test_uses_of_memory():
    tensor = torch.zeros(1)
    alone = internals.uses_of_memory(tensor)
    view = tensor.view(1)
    assert internals.uses_of_memory(tensor) == alone + 1
    del view
    assert internals.uses_of_memory(tensor) == alone


def test_copy_on_write():
    tensor = torch.zeros(2)
    copy = internals.copy_on_write(tensor)
    tensor += 1
    assert (tensor.tolist(), copy.tolist()) == ([1, 1], [0, 0])


def test_is_copy_on_write():
    tensor = torch.zeros(2)
    copy = internals.copy_on_write(tensor)
    assert internals.is_copy_on_write(tensor)
    assert internals.is_copy_on_write(copy)
    copy += 1
    assert not internals.is_copy_on_write(copy)


# --- modules, graphs, optimizers --------------------------------------------------------------------------------------


def test_pruned_name():
    (hook,) = prune.identity(nn.Linear(2, 2), "bias")._forward_pre_hooks.values()
    assert internals.pruned_name(hook) == "bias"


class Own(fx.Tracer):
    pass


def test_tracer_class():
    assert internals.tracer_class(fx.Graph(tracer_cls=Own)) is Own


def test_empty_like():
    class Code(fx.graph.CodeGen):
        pass

    graph = Own().trace(nn.ReLU())
    graph.set_codegen(Code())
    empty = internals.empty_like(graph)
    assert len(empty.nodes) == 0
    assert (type(empty._codegen), internals.tracer_class(empty)) == (Code, Own)


def test_runs_step_hooks():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.param_groups = inner.param_groups

        def step(self):
            pass

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    assert internals.runs_step_hooks(optimizer)
    assert not internals.runs_step_hooks(Wrapper(optimizer))


# --- compiling and exporting ------------------------------------------------------------------------------------------


def test_recompile_limit():
    from torch._dynamo import config

    before = config.recompile_limit
    with internals.recompile_limit(before + 1):
        assert config.recompile_limit == before + 1
    assert config.recompile_limit == before


class Summed(nn.Module):
    def forward(self, x):
        return x.sum(0) if x.shape[0] < 9 else x


def exported(x):
    dynamic = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(Summed(), (x,), dynamic_shapes=dynamic, strict=False)


def test_any_batch_size():
    with internals.any_batch_size():
        program = exported(torch.zeros(1, 2))
    assert program.module()(torch.ones(3, 2)).tolist() == [3, 3]


def test_fast_export():
    with internals.fast_export():
        assert not torch._dynamo.config.fake_tensor_cache_enabled
        fast = exported(torch.zeros(3, 2))
    assert torch._dynamo.config.fake_tensor_cache_enabled
    usual = exported(torch.zeros(3, 2))
    assert (str(fast.graph), internals.guards_of(fast)) == (str(usual.graph), internals.guards_of(usual))
    if torch.__version__ >= (2, 13):
        traced = [any("stack_trace" in node.meta for node in program.graph.nodes) for program in (fast, usual)]
        assert traced == [False, True]


def test_guards_of():
    guards = internals.guards_of(exported(torch.zeros(3, 2)))
    assert any("L['x'].size()[0]" in guard for guard in guards)
