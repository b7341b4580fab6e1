"""Follows values through the functions of a script: which tokens a loss is of, what was trained or counted before it.

Only structure counts: assignments, slices, loops, and the calls of torch and numpy. What variables and functions are
called plays no part. A loop is walked once, branches one after the other; what a script computes in other ways is not
seen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .scripts import name_of

# Calls by the last part of their names.
SIZES = {"len", "range", "size", "numel", "dim", "zeros", "ones", "empty", "full", "zeros_like", "ones_like", "eye"}
SIZES |= {"empty_like", "full_like", "randn", "rand", "new_zeros", "new_ones", "shape", "device", "dtype", "ndim"}
LOSSES = {"cross_entropy", "nll_loss"}
DISTRIBUTIONS = {"softmax", "log_softmax"}
LOOKUPS = {"take", "index_select", "get", "take_along_axis"}
UPDATES = {"update", "add_", "append", "extend", "scatter_add_", "index_add_", "index_put_", "put", "at"}
ACCUMULATORS = {"append", "extend", "add_"}
SAME_VALUE = {  # which give a value in another form, and compute no new one from a model
    "item", "detach", "float", "double", "half", "long", "int", "bool", "to", "cpu", "cuda", "numpy", "tolist", "clone",
    "contiguous", "reshape", "view", "flatten", "squeeze", "unsqueeze", "expand", "transpose", "permute", "sum", "mean",
    "clamp", "clip", "exp", "log", "log2", "neg", "abs", "mul", "div", "sub", "add", "max", "min", "tensor", "array",
    "asarray", "as_tensor", "from_numpy", "stack", "cat", "concatenate", "list", "tuple", "enumerate", "zip", "astype",
    "minimum", "maximum", "where", "logaddexp", "reversed", "sorted", "type", "pin_memory", "non_blocking",
}  # fmt: skip
WEIGHTS = "weights"  # stands for all that a backward pass changes


class Step(NamedTuple):
    """A subscript: its text, the loops that it varies with, and where its own values come from."""

    text: str
    loops: frozenset[int]
    origins: frozenset[Path]


class Path(NamedTuple):
    """Where a value comes from: a variable and the subscripts taken of it, val_tokens[start:end][1:]."""

    root: str
    steps: tuple[Step, ...] = ()

    def loops(self) -> frozenset[int]:
        """Return the loops that the value varies with."""
        found: set[int] = set()
        for step in self.steps:
            found |= step.loops
            for origin in step.origins:
                found |= origin.loops()
        return frozenset(found)


def overlap(a: Path, b: Path, inner: frozenset[int]) -> bool:
    """Whether one value is the other, or a part of it, for sweeps of the loops `inner` as a whole."""
    return a.root == b.root and all(same_step(x, y, inner) for x, y in zip(a.steps, b.steps))


def same_step(a: Step, b: Step, inner: frozenset[int]) -> bool:
    if a.text != b.text and not (a.loops & inner or b.loops & inner):
        return False
    if a.origins and b.origins:
        return any(overlap(x, y, inner) for x in a.origins for y in b.origins)
    return True


@dataclass(frozen=True)
class Value:
    """What is known of a value."""

    data: frozenset[Path] = frozenset()  # that it depends on
    objects: frozenset[str] = frozenset()  # models, tables, functions that take part
    loops: frozenset[int] = frozenset()  # of which it is a counter
    time: int = 0  # of the last call that computed it
    is_computed: bool = False  # by a call of something that is not known here
    is_loss: bool = False  # or a probability, of targets
    is_distribution: bool = False
    is_mixed: bool = False  # integers multiplied or combined by exclusive or
    is_hashed: bool = False  # and cut to the size of a table
    lookups: frozenset[frozenset[Path]] = frozenset()  # by hashed keys: what each key is made of
    is_mixture: bool = False  # a sum of products of probabilities


def union(*values: Value) -> Value:
    """Return what depends on all of these."""
    return Value(
        data=frozenset().union(*(value.data for value in values)),
        objects=frozenset().union(*(value.objects for value in values)),
        loops=frozenset().union(*(value.loops for value in values)),
        time=max((value.time for value in values), default=0),
        is_computed=any(value.is_computed for value in values),
        is_loss=any(value.is_loss for value in values),
        is_distribution=any(value.is_distribution for value in values),
        is_mixed=any(value.is_mixed for value in values),
        is_hashed=any(value.is_hashed for value in values),
        lookups=frozenset().union(*(value.lookups for value in values)),
        is_mixture=any(value.is_mixture for value in values),
    )


@dataclass
class Loop:
    """A loop, and what it runs over."""

    number: int
    node: ast.For | ast.While
    over: Value = Value()

    def covers(self) -> str:
        """Return what the loop runs over, as text: two loops of one text sweep the same."""
        if not isinstance(self.node, ast.For):
            return ""
        call = self.node.iter
        if isinstance(call, ast.Call) and name_of(call.func) == "range":
            starts_at_zero = len(call.args) == 1 or (isinstance(call.args[0], ast.Constant) and not call.args[0].value)
            return "from the first on" if starts_at_zero else ast.unparse(call)
        return ast.unparse(call)


@dataclass(frozen=True)
class Event:
    """Something that happens to data: it is trained on, counted in a table, or scored."""

    kind: str  # train, update, score
    time: int
    line: int
    data: frozenset[Path]
    loops: tuple[int, ...]  # around it, the outermost first
    objects: frozenset[str] = frozenset()  # that are changed, or that the score is of
    name: str = ""  # of the variable that scores are added to


@dataclass
class Summary:
    """What a call of a function of the script does."""

    parameters: list[str]
    trains: bool = False
    scores: bool = False
    trains_first: bool = False
    data: set[str] = field(default_factory=set)  # parameters that are data
    updated: set[str] = field(default_factory=set)  # parameters that it changes
    is_mixed: bool = False  # what it returns
    is_hashed: bool = False


class Flow:
    """Walks through a function once, in the order of its statements, and collects events and remarkable expressions."""

    def __init__(self, function: ast.FunctionDef | ast.AsyncFunctionDef, known: dict[str, Summary], modules: set[str]):
        self.function = function
        self.known = known  # functions of the script
        self.modules = modules  # names that are imported
        self.values: dict[str, Value] = {}
        self.events: list[Event] = []
        self.loops: list[Loop] = []  # around the present statement
        self.all_loops: list[Loop] = []
        self.targets: set[Path] = set()
        self.inputs: set[str] = set()  # variables that are given to a model, or subscripted
        self.remarks: list[tuple[str, int]] = []  # kind of expression, line
        self.calls: list[tuple[str, tuple[str, ...], int]] = []  # of the script's functions: name, arguments, line
        self.returned: list[Value] = []
        self.time = 0
        self.ungraded = 1 if any(is_no_grad(head) for head in function.decorator_list) else 0
        arguments = function.args
        self.parameters = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        self.is_whole = True  # nothing of it was too deep to be looked through
        try:
            self.walk(function.body)
        except RecursionError:
            self.is_whole = False

    # ---------------------------------------------------------------- statements
    def walk(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.time += 1
            self.visit(statement)

    def visit(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self.assign(target, value, node)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value), node)
        elif isinstance(node, ast.AugAssign):
            self.add(node)
        elif isinstance(node, ast.Return) and node.value is not None:
            value = self.value(node.value)
            self.returned.append(value)
            self.note_score(value, "return", node)
        elif isinstance(node, (ast.For, ast.While)):
            self.visit_loop(node)
        elif isinstance(node, ast.If):
            self.visit_branch(node)
        elif isinstance(node, ast.With):
            self.visit_with(node)
        elif isinstance(node, ast.Try):
            handlers = [handler.body for handler in node.handlers]
            for part in (node.body, *handlers, node.orelse, node.finalbody):
                self.walk(part)
        elif isinstance(node, ast.Expr):
            self.value(node.value)

    def visit_loop(self, node: ast.For | ast.While) -> None:
        loop = Loop(len(self.all_loops) + 1, node)
        if isinstance(node, ast.For):
            loop.over = self.value(node.iter)
        self.all_loops.append(loop)
        self.loops.append(loop)
        if isinstance(node, ast.For):
            self.bind_items(node.target, node.iter, loop)
        self.walk(node.body)
        self.loops.pop()
        self.walk(node.orelse)

    def bind_items(self, target: ast.expr, iterable: ast.expr, loop: Loop) -> None:
        """Give loop variables their values: counters, or items of what the loop runs over."""
        counter = Value(loops=frozenset({loop.number}))
        call = name_of(iterable.func) if isinstance(iterable, ast.Call) else ""
        if call == "enumerate" and isinstance(target, ast.Tuple) and iterable.args:
            self.assign(target.elts[0], counter, loop.node)
            self.bind_items(target.elts[1], iterable.args[0], loop)
        elif call == "zip" and isinstance(target, ast.Tuple):
            for part, source in zip(target.elts, iterable.args):
                self.bind_items(part, source, loop)
        elif call.rpartition(".")[2] in ("range", "arange", "count"):
            self.assign(target, counter, loop.node)
        else:
            source = self.value(iterable)
            step = Step("*", frozenset({loop.number}), frozenset())
            items = frozenset(Path(path.root, (*path.steps, step)) for path in source.data)
            self.assign(target, replace(source, data=items, loops=source.loops | counter.loops), loop.node)

    def visit_branch(self, node: ast.If) -> None:
        condition = self.value(node.test)
        for statement in node.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                before = self.values.get(statement.targets[0].id, Value())
                self.check_choice(condition, self.value(statement.value), before, statement.lineno)
        self.walk(node.body)
        self.walk(node.orelse)

    def visit_with(self, node: ast.With) -> None:
        ungraded = any(is_no_grad(item.context_expr) for item in node.items)
        self.ungraded += ungraded
        self.walk(node.body)
        self.ungraded -= ungraded

    def assign(self, target: ast.expr, value: Value, node: ast.stmt) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.assign(part, value, node)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value, node)
        elif isinstance(target, ast.Subscript):
            name = name_of(target.value)
            self.note_score(value, name, node)
            key = self.value(target.slice)
            self.note("update", union(value, key), node, frozenset({name}))
            self.values[name] = union(self.values.get(name, Value()), value)
        elif name := name_of(target):
            self.values[name] = value

    def add(self, node: ast.AugAssign) -> None:
        value = self.value(node.value)
        name = name_of(node.target.value if isinstance(node.target, ast.Subscript) else node.target)
        if isinstance(node.op, ast.Add) and self.note_score(value, name, node):
            pass
        elif isinstance(node.target, ast.Subscript):
            key = self.value(node.target.slice)
            self.note("update", union(value, key), node, frozenset({name}))
        before = self.values.get(name, Value(data=frozenset({Path(name)})))
        together = union(before, value)
        is_mixed = together.is_mixed or isinstance(node.op, (ast.Mult, ast.BitXor, ast.LShift))
        is_hashed = together.is_hashed or (is_mixed and isinstance(node.op, (ast.Mod, ast.BitAnd)))
        self.values[name] = replace(together, is_mixed=is_mixed, is_hashed=is_hashed)

    # ---------------------------------------------------------------- events
    def note(self, kind: str, value: Value, node: ast.AST, objects: frozenset[str], name: str = "") -> None:
        loops = tuple(loop.number for loop in self.loops)
        time = value.time if kind == "score" and value.time else self.time
        self.events.append(Event(kind, time, node.lineno, value.data, loops, objects, name))

    def note_score(self, value: Value, name: str, node: ast.AST) -> bool:
        """Note that losses are collected. Return whether they are."""
        is_score = bool(value.data) and (value.is_loss or (self.ungraded > 0 and value.is_computed))
        if is_score:
            self.note("score", value, node, value.objects, name)
        return is_score

    # ---------------------------------------------------------------- expressions
    def value(self, node: ast.AST) -> Value:
        """Return what is known of the value of an expression."""
        if isinstance(node, ast.Name):
            if node.id not in self.values and node.id in self.modules:
                return Value()
            known = self.values.get(node.id, Value(data=frozenset({Path(node.id)})))
            return replace(known, objects=known.objects | {node.id})
        if isinstance(node, ast.Attribute):
            return self.value_of_attribute(node)
        if isinstance(node, ast.Subscript):
            return self.value_of_subscript(node)
        if isinstance(node, ast.Call):
            return self.value_of_call(node)
        if isinstance(node, ast.BinOp):
            return self.value_of_operation(node)
        if isinstance(node, ast.IfExp):
            condition, body, other = self.value(node.test), self.value(node.body), self.value(node.orelse)
            self.check_choice(condition, body, other, node.lineno)
            return union(body, other)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            return self.value_of_comprehension(node)
        if isinstance(node, (ast.Lambda, ast.JoinedStr, ast.Constant)):
            return Value()
        together = union(*(self.value(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)))
        return replace(together, is_loss=together.is_loss and not isinstance(node, ast.Compare))

    def value_of_attribute(self, node: ast.Attribute) -> Value:
        name = name_of(node)
        if name in self.values:
            return self.values[name]
        if node.attr in SIZES:
            return Value()
        if name.startswith("self."):
            return Value(data=frozenset({Path(name)}), objects=frozenset({name}))
        return self.value(node.value)

    def value_of_subscript(self, node: ast.Subscript) -> Value:
        base = self.value(node.value)
        index = self.value(node.slice)
        if isinstance(node.value, ast.Name):
            self.inputs.add(node.value.id)
        step = Step(ast.unparse(node.slice), index.loops, index.data)
        data = frozenset(Path(path.root, (*path.steps, step)) for path in base.data)
        if isinstance(node.slice, ast.Slice):
            return replace(base, data=data)
        return self.look_up(replace(base, data=data), index, node)

    def look_up(self, table: Value, key: Value, node: ast.AST) -> Value:
        """Return the value of a table, or of a distribution, at a key."""
        if table.is_distribution:
            self.targets |= key.data
        lookups = table.lookups | key.lookups
        if key.is_hashed:
            lookups |= {key.data}
            if self.holds_target(key):
                self.remarks.append(("key", node.lineno))
        return Value(
            data=table.data | key.data, objects=table.objects | key.objects, time=max(table.time, key.time),
            is_loss=table.is_loss or table.is_distribution, is_computed=table.is_computed, lookups=lookups,
        )  # fmt: skip

    def value_of_operation(self, node: ast.BinOp) -> Value:
        left = self.value(node.left)
        right = self.value(node.right)
        together = union(left, right)
        if isinstance(node.op, (ast.Mult, ast.BitXor, ast.LShift)):
            return replace(together, is_mixed=True)
        if isinstance(node.op, (ast.Mod, ast.BitAnd)) and left.is_mixed:
            return replace(together, is_hashed=True)
        if isinstance(node.op, ast.Div) and self.is_ratio(left, right):
            self.remarks.append(("key", node.lineno))
        if isinstance(node.op, ast.Add):
            has_products = is_product(node.left) and is_product(node.right)
            return replace(together, is_mixture=together.is_mixture or (together.is_loss and has_products))
        return together

    def is_ratio(self, numerator: Value, denominator: Value) -> bool:
        """Whether a count of context and target, at a hashed key, is divided by the count of the context."""
        for full in numerator.lookups:
            if any(path.root == "arange()" for path in full):
                continue  # of all pieces of the vocabulary
            if any(context < full for context in denominator.lookups):
                return True
        return False

    def value_of_comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> Value:
        before = dict(self.values)
        for part in node.generators:
            source = self.value(part.iter)
            for name in (n.id for n in ast.walk(part.target) if isinstance(n, ast.Name)):
                self.values[name] = source
        parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
        value = union(*(self.value(part) for part in parts))
        self.values = before
        return value

    def value_of_call(self, node: ast.Call) -> Value:
        name = name_of(node.func)
        last = name.rpartition(".")[2] or getattr(node.func, "attr", "")
        arguments = [self.value(part) for part in node.args]
        arguments += [self.value(keyword.value) for keyword in node.keywords]
        receiver = Value()
        if isinstance(node.func, ast.Attribute):
            receiver = self.value(node.func.value)
        elif isinstance(node.func, ast.Call):
            receiver = self.value(node.func)
        together = union(receiver, *arguments)
        if last in self.known:
            return self.call_known(node, last, receiver)
        if last == "arange":
            return Value(data=frozenset({Path("arange()")}), loops=together.loops)
        if last in SIZES:
            return Value(loops=together.loops)
        if last == "backward" or (last == "grad" and arguments):
            self.note("train", receiver if last == "backward" else arguments[0], node, frozenset({WEIGHTS}))
            return together
        if last in LOSSES:
            self.targets |= argument(node, 1, "target", arguments).data
            return replace(together, is_loss=True, time=self.time)
        if last in DISTRIBUTIONS:
            return replace(together, is_distribution=True, time=self.time)
        if last == "hash":
            return replace(together, is_mixed=True, is_hashed=True)
        if last == "gather" or last in LOOKUPS:
            table, keys = (receiver, arguments) if receiver.data or receiver.objects else (arguments[:1], arguments[1:])
            return self.look_up(table if isinstance(table, Value) else union(*table), union(*keys), node)
        if last in ("min", "max", "minimum", "maximum", "fmin", "fmax"):
            self.check_best(arguments, node)
        if last == "where" and len(arguments) == 3:
            self.check_choice(*arguments, node.lineno)
        if last in UPDATES:
            self.note_update(node, last, receiver, arguments)
        if last in SAME_VALUE:
            return together
        return self.computed(node, name, together)

    def computed(self, node: ast.Call, name: str, together: Value) -> Value:
        """Return the result of a call of something that is not known here, as a model is."""
        for part in node.args:
            self.inputs |= {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
        data = together.data
        if not data and name:
            step = Step("*", frozenset(loop.number for loop in self.loops), frozenset())
            data = frozenset({Path(f"{name}()", (step,))})
        objects = together.objects | ({name} if name else set())
        return replace(together, data=data, objects=objects, time=self.time, is_computed=True, is_distribution=False)

    def call_known(self, node: ast.Call, name: str, receiver: Value) -> Value:
        """Return the result of a call of a function of the script, and note what it does."""
        summary = self.known[name]
        parameters = [p for p in summary.parameters if p != "self"]
        given = dict(zip(parameters, node.args))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        values = {parameter: self.value(part) for parameter, part in given.items()}
        data = union(*(values[p] for p in summary.data if p in values))
        self.inputs |= {
            n.id for p in summary.data & given.keys() for n in ast.walk(given[p]) if isinstance(n, ast.Name)
        }
        everything = union(receiver, *values.values())
        changed = {name_of(given[p]) for p in summary.updated if p in given}
        changed |= set(receiver.objects) if any(p.startswith("self.") for p in summary.updated) else set()
        if summary.scores and (summary.updated or summary.trains) and summary.data & given.keys():
            self.calls.append((name, tuple(sorted(ast.unparse(part) for part in given.values())), node.lineno))
        if summary.trains and summary.trains_first:
            self.note("train", data, node, frozenset({WEIGHTS}))
            self.time += 1
        scored_at = self.time
        if summary.trains and not summary.trains_first:
            self.time += 1
            self.note("train", data, node, frozenset({WEIGHTS}))
        if changed:
            self.note("update", data, node, frozenset(changed))
        result = replace(data, objects=everything.objects | {name}, time=scored_at, is_computed=True)
        if not summary.scores:
            is_mixed = everything.is_mixed or summary.is_mixed
            is_hashed = (everything.is_hashed or summary.is_hashed) and is_mixed
            return replace(result, data=everything.data, is_mixed=is_mixed, is_hashed=is_hashed)
        if summary.trains:
            self.note("score", result, node, result.objects, name)
        return replace(result, is_loss=True)

    def note_update(self, node: ast.Call, last: str, receiver: Value, arguments: list[Value]) -> None:
        value = union(*arguments)
        name = name_of(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if last in ACCUMULATORS and self.note_score(value, name, node):
            return
        objects = frozenset({name})
        if last == "at" and node.args:  # numpy.add.at(table, keys, values)
            objects = frozenset({name_of(node.args[0])})
        if value.data and name and name not in self.modules:
            self.note("update", value, node, objects)

    # ---------------------------------------------------------------- mixtures
    def holds_target(self, value: Value) -> bool:
        """Whether a value depends on the targets of a loss, or a part of them."""
        return any(overlap(path, target, frozenset()) for path in value.data for target in self.targets)

    def check_best(self, arguments: list[Value], node: ast.Call) -> None:
        """Remark the better of two losses of a target: which one is better, only the target tells."""
        losses = [value for value in arguments if value.is_loss]
        if len(losses) > 1 and losses[0].objects != losses[1].objects:
            self.remarks.append(("best", node.lineno))

    def check_choice(self, condition: Value, one: Value, other: Value, line: int) -> None:
        """Remark a choice between two losses, or between a mixture and not, that depends on the target."""
        if not (one.is_loss and other.is_loss):
            return
        if self.holds_target(condition) and one.is_mixture != other.is_mixture:
            self.remarks.append(("choice", line))
        elif one.objects != other.objects and one.objects | other.objects <= condition.objects and not one.is_mixture:
            self.remarks.append(("best", line))

    # ---------------------------------------------------------------- summary
    def summary(self) -> Summary:
        """Return what a call of this function does."""
        trains = [event for event in self.events if event.kind == "train"]
        scores = [event for event in self.events if event.kind == "score"]
        data = {path.root for event in (*trains, *scores) for path in event.data}
        data &= self.inputs | {path.root for path in self.targets}
        updated = {name for event in self.events if event.kind == "update" for name in event.objects}
        own = {name for name in updated if name in self.parameters or name.startswith("self.")}
        updated_data = {p.root for e in self.events if e.kind == "update" for p in e.data if e.objects & own}
        first_score = min((event.time for event in scores), default=self.time + 1)
        return Summary(
            self.parameters, bool(trains), bool(scores),
            bool(trains) and min(event.time for event in trains) < first_score,
            (data | updated_data) & set(self.parameters), own,
            any(value.is_mixed for value in self.returned),
            any(value.is_hashed for value in self.returned) or self.returns_cut(),
        )  # fmt: skip

    def returns_cut(self) -> bool:
        """Whether the function cuts what it is given to the size of a table: return h & mask."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Return) and node.value is not None:
                operations = (n.op for n in ast.walk(node.value) if isinstance(n, ast.BinOp))
                if any(isinstance(operation, (ast.Mod, ast.BitAnd)) for operation in operations):
                    return True
        return False


def is_product(node: ast.expr) -> bool:
    """Whether an expression is a product, or the quotient of one: a * p / q."""
    if not isinstance(node, ast.BinOp):
        return False
    return isinstance(node.op, ast.Mult) or (isinstance(node.op, ast.Div) and is_product(node.left))


def is_no_grad(node: ast.expr) -> bool:
    """Whether an expression is torch.no_grad or torch.inference_mode, called or not."""
    name = name_of(node.func if isinstance(node, ast.Call) else node)
    return name.rpartition(".")[2] in ("no_grad", "inference_mode")


def argument(node: ast.Call, position: int, keyword: str, values: list[Value]) -> Value:
    """Return the value of an argument that is given by its position or its name."""
    if len(node.args) > position:
        return values[position]
    names = [None] * len(node.args) + [part.arg for part in node.keywords]
    return values[names.index(keyword)] if keyword in names else Value()


def flows_of(tree: ast.Module) -> Iterator[Flow]:
    """Yield the flow of every function of a script, with what the functions do that they call."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    known = {function.name: Summary([]) for function in functions}
    for _ in range(3):  # calls of calls: three levels of them
        flows = [Flow(function, known, modules) for function in functions]
        known = {flow.function.name: flow.summary() for flow in flows}
    yield from flows
