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
CRITERIA = {"CrossEntropyLoss", "NLLLoss"}  # make functions of that kind
GRADIENTS = {"grad", "value_and_grad", "grad_and_value"}
DISTRIBUTIONS = {"softmax", "log_softmax"}
LOOKUPS = {"take", "index_select", "get", "take_along_axis"}
COUNTS = {"update", "scatter_add_", "index_add_", "index_put_", "put", "at"}
UPDATES = {*COUNTS, "add_", "append", "extend"}
MIXERS = {"bitwise_xor", "bitwise_left_shift", "mul", "multiply"}  # as the operators ^, << and *
CUTS = {"remainder", "fmod", "bitwise_and"}  # as the operators % and &
FORMS = {"to", "view", "reshape", "expand", "permute", "transpose", "flatten", "type", "astype", "cuda", "squeeze"}
FORMS |= {"unsqueeze", "sum", "mean", "clamp", "clip"}  # whose arguments are sizes, devices, bounds
ACCUMULATORS = {"append", "extend", "add_"}
SAME_VALUE = {  # which give a value in another form, and compute no new one from a model
    "item", "detach", "float", "double", "half", "long", "int", "bool", "to", "cpu", "cuda", "numpy", "tolist", "clone",
    "contiguous", "reshape", "view", "flatten", "squeeze", "unsqueeze", "expand", "transpose", "permute", "sum", "mean",
    "clamp", "clip", "exp", "log", "log2", "neg", "abs", "mul", "div", "sub", "add", "max", "min", "tensor", "array",
    "asarray", "as_tensor", "from_numpy", "stack", "cat", "concatenate", "list", "tuple", "enumerate", "zip", "astype",
    "minimum", "maximum", "where", "logaddexp", "reversed", "sorted", "type", "pin_memory", "amin", "remainder", "fmod",
    "bitwise_and", "requires_grad_", "detach_", "clamp_",
}  # fmt: skip
WEIGHTS = "weights"  # stands for all that a backward pass changes
# What is followed at most; a function that is larger is said not to have been looked through.
MAX_PATHS = 24  # of a value
MAX_STEPS = 8  # of a path
MAX_EVENTS = 400  # of a function
MAX_EXPRESSIONS = 100_000


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
        return frozenset().union(*(step.loops for step in self.steps))

    def at(self, text: str, loops: frozenset[int] = frozenset(), origins: frozenset[Path] = frozenset()) -> Path:
        """Return the path of a part of the value. Of where an index comes from, only one level is kept."""
        if len(self.steps) >= MAX_STEPS:
            return self
        plain = frozenset(Path(o.root, tuple(step._replace(origins=frozenset()) for step in o.steps)) for o in origins)
        plain = limited(plain)
        together = loops.union(*(origin.loops() for origin in origins))
        return Path(self.root, (*self.steps, Step(text, together, plain)))

    def is_part(self) -> bool:
        """Whether it is a part of a variable, or new from a call, and not an attribute, as settings are."""
        return bool(self.steps) and not self.steps[-1].text.startswith(".")


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
    is_each: bool = False  # of each target by itself
    is_stack: bool = False  # of several such losses
    is_comparison: bool = False  # of two such losses
    is_collected: bool = False  # a sum or list of losses that have been noted
    made_in: frozenset[int] = frozenset()  # loops around the call that computed it
    is_distribution: bool = False
    is_mixed: bool = False  # integers multiplied or combined by exclusive or
    is_hashed: bool = False  # and cut to the size of a table
    keys: frozenset[frozenset[Path]] = frozenset()  # what each hashed key in it is made of
    lookups: frozenset[frozenset[Path]] = frozenset()  # and each by which something in it was looked up
    is_mixture: bool = False  # a sum of products of probabilities


def limited(paths: frozenset[Path]) -> frozenset[Path]:
    """Return so many of the paths that all can be followed."""
    if len(paths) <= MAX_PATHS:
        return paths
    return frozenset(sorted(paths, key=lambda path: (path.root, [step.text for step in path.steps]))[:MAX_PATHS])


def union(*values: Value) -> Value:
    """Return what depends on all of these."""
    if len(values) == 1:
        return values[0]
    data = limited(frozenset().union(*(value.data for value in values)))
    keys = frozenset().union(*(value.keys for value in values))
    lookups = frozenset().union(*(value.lookups for value in values))
    flags = {name: any(getattr(value, name) for value in values) for name in FLAGS}
    return Value(
        data=data,
        objects=frozenset().union(*(value.objects for value in values)),
        loops=frozenset().union(*(value.loops for value in values)),
        made_in=frozenset().union(*(value.made_in for value in values)),
        time=max((value.time for value in values), default=0),
        keys=keys if len(keys) <= MAX_PATHS else frozenset(),
        lookups=lookups if len(lookups) <= MAX_PATHS else frozenset(),
        **flags,
    )


def hashed(value: Value) -> Value:
    """Return a value that was cut to the size of a table."""
    return replace(value, is_mixed=True, is_hashed=True, keys=frozenset({value.data}))


def are_nested(keys: frozenset[frozenset[Path]]) -> bool:
    """Whether one hashed key is made of what another is, and of more; of all pieces of the vocabulary is none."""
    some = [key for key in keys if not any(path.root == "arange()" for path in key)]
    return any(one < other for one in some for other in some)


FLAGS = [name for name in Value.__dataclass_fields__ if name.startswith("is_")]


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

    kind: str  # train, count (in a table), update (of anything), score
    time: int
    line: int
    data: frozenset[Path]
    loops: tuple[int, ...]  # around it, the outermost first
    objects: frozenset[str] = frozenset()  # that are changed, or that the score is of
    name: str = ""  # of the variable that scores are added to
    made_in: frozenset[int] = frozenset()  # loops around what computed the score


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
    is_each: bool = False
    keys: frozenset[frozenset[Path]] = frozenset()  # hashed keys that it returns, where one is a part of another
    lookups: frozenset[frozenset[Path]] = frozenset()  # of what it returns


Function = ast.FunctionDef | ast.AsyncFunctionDef


class KnownCall(NamedTuple):
    """A call of a function of the script: two with one key are given the same things."""

    name: str
    key: tuple[object, ...]
    branches: tuple[tuple[int, int], ...]
    line: int


class TooLarge(Exception):
    """A function is larger than what is followed."""


class Flow:
    """Walks through a function once, in the order of its statements, and collects events and remarkable expressions."""

    def __init__(
        self, function: Function, known: dict[str, Summary], modules: set[str], criteria: set[str], makers: set[str]
    ):
        self.function = function
        self.known = known  # functions of the script
        self.modules = modules  # names that are imported
        self.criteria = criteria  # names of what computes losses
        self.makers = makers  # names of what makes parameters or models, which are no tokens
        self.values: dict[str, Value] = {}
        self.events: list[Event] = []
        self.loops: list[Loop] = []  # around the present statement
        self.all_loops: list[Loop] = []
        self.targets: set[Path] = set()
        self.inputs: set[str] = set()  # variables that are given to a model, or subscripted
        self.remarks: list[tuple[str, int]] = []  # kind of expression, line
        self.calls: list[KnownCall] = []  # of the script's functions that score and change something
        self.called: set[str] = set()  # functions of the script
        self.versions: dict[str, int] = {}  # how often a variable was assigned
        self.branches: tuple[tuple[int, int], ...] = ()  # line of an `if` around, and its arm
        self.num_expressions = 0
        self.returned: list[Value] = []
        self.time = 0
        self.ungraded = 1 if any(is_no_grad(head) for head in function.decorator_list) else 0
        arguments = function.args
        self.parameters = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        self.is_whole = True  # nothing of it was too large or too deep to be followed
        try:
            self.walk(function.body)
        except (RecursionError, TooLarge):
            self.is_whole = False

    # ---------------------------------------------------------------- statements
    def walk(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.time += 1
            self.visit(statement)

    def visit(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            self.visit_assignment(node)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.assign(node.target, self.value(node.value), node)
        elif isinstance(node, ast.AugAssign):
            self.add(node)
        elif isinstance(node, ast.Return):
            if node.value is not None:
                value = self.value(node.value)
                self.returned.append(value)
                self.note_score(value, "return", node)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            self.visit_loop(node)
        elif isinstance(node, ast.If):
            self.visit_branch(node)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            self.visit_with(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield):
            if node.value.value is not None:
                self.note_score(self.value(node.value.value), "return", node)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self.visit_parts(node)

    def visit_parts(self, node: ast.AST) -> None:
        """Look at all that a statement of another kind holds: try, match, assert, an expression."""
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.stmt):
                self.time += 1
                self.visit(part)
            elif isinstance(part, ast.expr):
                self.value(part)
            else:  # a handler, a case
                self.visit_parts(part)

    def visit_assignment(self, node: ast.Assign) -> None:
        for target in node.targets:
            is_pair = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            if is_pair and len(target.elts) == len(node.value.elts):
                values = [self.value(part) for part in node.value.elts]
                for part, value in zip(target.elts, values):
                    self.assign(part, value, node)
            else:
                self.assign(target, self.value(node.value), node)

    def visit_loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        loop = Loop(len(self.all_loops) + 1, node)
        is_counted = not isinstance(node, ast.While)
        if is_counted:
            loop.over = self.value(node.iter)
        self.all_loops.append(loop)
        self.loops.append(loop)
        if is_counted:
            self.bind_items(node.target, node.iter, loop.over, loop)
        else:
            self.value(node.test)
        self.walk(node.body)
        self.loops.pop()
        self.walk(node.orelse)

    def bind_items(self, target: ast.expr, iterable: ast.expr, source: Value, loop: Loop) -> None:
        """Give loop variables their values: counters, or items of what the loop runs over."""
        counter = Value(loops=frozenset({loop.number}))
        call = name_of(iterable.func) if isinstance(iterable, ast.Call) else ""
        if call == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2 and iterable.args:
            self.assign(target.elts[0], counter, loop.node)
            self.bind_items(target.elts[1], iterable.args[0], source, loop)
        elif call == "zip" and isinstance(target, ast.Tuple):
            for part, each in zip(target.elts, iterable.args):
                self.bind_items(part, each, self.value(each), loop)
        elif call.rpartition(".")[2] in ("range", "arange", "count"):
            self.assign(target, counter, loop.node)
        else:
            is_new = call.rpartition(".")[2] in self.makers  # a loader of the script: its items are tokens
            data = source.data or frozenset({Path(f"{call}() in line {loop.node.lineno}")} if is_new else ())
            items = frozenset(path.at("*", counter.loops) for path in data)
            self.assign(target, replace(source, data=items, loops=source.loops | counter.loops), loop.node)

    def visit_branch(self, node: ast.If) -> None:
        condition = self.value(node.test)
        before = dict(self.values)
        around = self.branches
        for arm, body in enumerate((node.body, node.orelse)):
            self.branches = (*around, (node.lineno, arm))
            self.walk(body)
            for name, value in self.values.items():
                if arm == 0 and name in before and value is not before[name]:
                    self.check_choice(condition, value, before[name], node.lineno)
        self.branches = around

    def visit_with(self, node: ast.With | ast.AsyncWith) -> None:
        ungraded = any(is_no_grad(item.context_expr) for item in node.items)
        for item in node.items:
            self.value(item.context_expr)
        self.ungraded += ungraded
        self.walk(node.body)
        self.ungraded -= ungraded

    def assign(self, target: ast.expr, value: Value, node: ast.AST) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for number, part in enumerate(target.elts):
                own = frozenset(path.at(f"item {number}") for path in value.data)
                self.assign(part, replace(value, data=own), node)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value, node)
        elif isinstance(target, ast.Subscript):
            name = name_of(target.value)
            before = self.values.get(name, Value())
            key = self.value(target.slice)
            if key.is_comparison and before.is_each and value.is_each:
                self.remarks.append(("best", node.lineno))
            is_collected = self.note_score(value, name, node)
            self.note("update", union(value, key), node, frozenset({name}))
            self.values[name] = union(before, replace(value, is_collected=is_collected or value.is_collected))
        elif name := name_of(target):
            self.values[name] = value
            self.versions[name] = self.versions.get(name, 0) + 1

    def add(self, node: ast.AugAssign) -> None:
        value = self.value(node.value)
        name = name_of(node.target.value if isinstance(node.target, ast.Subscript) else node.target)
        is_collected = isinstance(node.op, (ast.Add, ast.Sub)) and self.note_score(value, name, node)
        if is_collected:
            value = replace(value, is_collected=True, is_each=False)
        elif isinstance(node.target, ast.Subscript):
            key = self.value(node.target.slice)
            self.note("count", union(value, key), node, frozenset({name}))
        before = self.values.get(name, Value(data=frozenset({Path(name)})))
        together = union(before, value)
        is_mixed = together.is_mixed or isinstance(node.op, (ast.Mult, ast.BitXor, ast.LShift))
        is_hashed = together.is_hashed or (is_mixed and isinstance(node.op, (ast.Mod, ast.BitAnd)))
        self.values[name] = replace(together, is_mixed=is_mixed, is_hashed=is_hashed)
        if is_mixed and isinstance(node.op, (ast.Mod, ast.BitAnd)):
            self.values[name] = hashed(together)

    # ---------------------------------------------------------------- events
    def note(self, kind: str, value: Value, node: ast.AST, objects: frozenset[str], name: str = "") -> None:
        loops = tuple(loop.number for loop in self.loops)
        time = value.time if kind == "score" and value.time else self.time
        self.events.append(Event(kind, time, node.lineno, value.data, loops, objects, name, value.made_in))
        if len(self.events) > MAX_EVENTS:
            raise TooLarge

    def note_score(self, value: Value, name: str, node: ast.AST) -> bool:
        """Note that losses are collected. Return whether they are."""
        is_loss = value.is_loss or (self.ungraded > 0 and value.is_computed)
        is_score = bool(value.data) and not value.is_collected and is_loss
        if is_score:
            self.note("score", value, node, value.objects, name)
        return is_score

    # ---------------------------------------------------------------- expressions
    def value(self, node: ast.AST) -> Value:
        """Return what is known of the value of an expression."""
        self.num_expressions += 1
        if self.num_expressions > MAX_EXPRESSIONS:
            raise TooLarge
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
        if isinstance(node, ast.NamedExpr):
            value = self.value(node.value)
            self.assign(node.target, value, node)
            return value
        if isinstance(node, (ast.Lambda, ast.JoinedStr, ast.Constant)):
            return Value()
        parts = [self.value(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        if isinstance(node, ast.Compare):
            each = [part for part in parts if part.is_each]
            is_comparison = len(each) > 1 and each[0].objects != each[1].objects
            return replace(union(*parts), is_loss=False, is_each=False, is_comparison=is_comparison)
        return union(*parts)

    def value_of_attribute(self, node: ast.Attribute) -> Value:
        name = name_of(node)
        if name in self.values:
            return self.values[name]
        if node.attr in SIZES:
            return Value()
        if name.startswith("self."):
            return Value(data=frozenset({Path(name)}), objects=frozenset({name}))
        whole = self.value(node.value)
        if not isinstance(node.value, ast.Name) or node.attr in ("T", "mT", "data", "values", "indices"):
            return whole
        return replace(whole, data=frozenset(path.at(f".{node.attr}") for path in whole.data))

    def value_of_subscript(self, node: ast.Subscript) -> Value:
        base = self.value(node.value)
        index = self.value(node.slice)
        if isinstance(node.value, ast.Name):
            self.inputs.add(node.value.id)
        text = ast.unparse(node.slice)
        data = frozenset(path.at(text, index.loops, index.data) for path in base.data)
        if isinstance(node.slice, ast.Slice):
            return replace(base, data=data, loops=base.loops | index.loops)
        return self.look_up(replace(base, data=data), index, node)

    def look_up(self, table: Value, key: Value, node: ast.AST) -> Value:
        """Return the value of a table, or of a distribution, at a key."""
        if table.is_distribution:
            self.targets |= key.data
        lookups = table.lookups | key.lookups
        if key.is_hashed:
            lookups |= {key.data} | (key.keys if are_nested(key.keys) else frozenset())
            if self.holds_target(key):
                self.remarks.append(("key", node.lineno))
        chosen = frozenset(path for path in key.data if path.root != "arange()")  # positions are no content
        return Value(
            data=limited(table.data | chosen),
            objects=table.objects | key.objects,
            loops=table.loops | key.loops,
            made_in=table.made_in,
            time=max(table.time, key.time),
            is_computed=table.is_computed,
            is_loss=table.is_loss or table.is_distribution,
            is_each=table.is_each or table.is_distribution,
            is_collected=table.is_collected,
            is_mixed=table.is_mixed,
            is_hashed=table.is_hashed,
            keys=table.keys,
            lookups=lookups,
        )

    def value_of_operation(self, node: ast.BinOp) -> Value:
        left = self.value(node.left)
        right = self.value(node.right)
        together = union(left, right)
        if isinstance(node.op, (ast.Mult, ast.BitXor, ast.LShift)):
            return replace(together, is_mixed=True)
        if isinstance(node.op, (ast.Mod, ast.BitAnd)) and left.is_mixed:
            return hashed(together)
        if isinstance(node.op, ast.Div) and self.is_ratio(left, right):
            self.remarks.append(("key", node.lineno))
        if isinstance(node.op, ast.Add):
            has_products = is_product(node.left) and is_product(node.right)
            if together.is_loss and has_products:  # a new loss, whatever was noted of its parts
                made_in = frozenset() if together.is_collected else together.made_in  # of each round, not the last
                return replace(together, is_mixture=True, is_collected=False, made_in=made_in)
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
        receiver = Value()
        if isinstance(node.func, ast.Attribute):
            receiver = self.value(node.func.value)
        elif isinstance(node.func, ast.Call):
            receiver = self.value(node.func)
        if self.is_known(node.func, last):
            return self.call_known(node, last, receiver)
        arguments = [self.value(part) for part in node.args]
        arguments += [self.value(keyword.value) for keyword in node.keywords]
        together = union(receiver, *arguments)
        if last == "arange":
            return Value(data=frozenset({Path("arange()")}), loops=together.loops)
        if last in SIZES or last in ("any", "all"):
            return Value(loops=together.loops)
        if self.is_gradient(node, last, arguments):
            trained = arguments[:1] if last == "grad" else [receiver, *arguments]
            self.note("train", union(*trained), node, frozenset({WEIGHTS}))
            return together
        if last in LOSSES or last in self.criteria:
            self.targets |= argument(node, 1, "target", arguments).data
            is_each = any(k.arg == "reduction" and ast.unparse(k.value) == "'none'" for k in node.keywords)
            return replace(self.made_now(together), is_loss=True, is_each=is_each)
        if last in DISTRIBUTIONS:
            return replace(self.made_now(together), is_distribution=True)
        if last == "hash" or (last.rstrip("_") in CUTS and together.is_mixed):
            return self.kept(node, last, hashed(together))
        if last.rstrip("_") in MIXERS:
            return self.kept(node, last, replace(together, is_mixed=True))
        if last == "gather" or last in LOOKUPS:
            if receiver.data or receiver.objects:
                return self.look_up(receiver, union(*arguments), node)
            return self.look_up(union(*arguments[:1]), union(*arguments[1:]), node)
        self.look_for_mixtures(node, last, receiver, arguments)
        if last in UPDATES:
            self.note_update(node, last, receiver, arguments)
        if last == "stack" and isinstance(node.args[0] if node.args else None, (ast.List, ast.Tuple)):
            stacked = sum(self.value(part).is_each for part in node.args[0].elts)
            return replace(together, is_stack=stacked > 1)
        if last in SAME_VALUE:
            value = receiver if last in FORMS and receiver.data else together
            return replace(value, is_each=value.is_each and last not in ("sum", "mean", "item"))
        return self.computed(node, name, together)

    def kept(self, node: ast.Call, last: str, value: Value) -> Value:
        """Return the result of a call, and keep it where the call works in place: key.bitwise_xor_(piece)."""
        if last.endswith("_") and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            name = name_of(owner.value if isinstance(owner, ast.Subscript) else owner)
            if name:
                self.values[name] = union(self.values.get(name, Value()), value)
        return value

    def is_known(self, function: ast.expr, last: str) -> bool:
        """Whether a call is one of the script's functions: methods are called on something, others are not."""
        if last not in self.known:
            return False
        is_method = self.known[last].parameters[:1] == ["self"]
        return is_method == isinstance(function, ast.Attribute)

    def is_gradient(self, node: ast.Call, last: str, arguments: list[Value]) -> bool:
        """Whether a call computes gradients: loss.backward(), torch.autograd.grad(loss, …), torch.func.grad(f)(…)."""
        if isinstance(node.func, ast.Call):
            return name_of(node.func.func).rpartition(".")[2] in GRADIENTS
        return last == "backward" or (last == "grad" and len(arguments) > 1)

    def made_now(self, value: Value) -> Value:
        return replace(value, time=self.time, made_in=frozenset(loop.number for loop in self.loops))

    def computed(self, node: ast.Call, name: str, together: Value) -> Value:
        """Return the result of a call of something that is not known here, as a model or a loader is."""
        for part in node.args:
            self.inputs |= {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
        data = together.data
        is_maker = name.rpartition(".")[2] in self.makers
        if name and not is_maker and not any(path.is_part() for path in data):  # each call gives something new
            data |= {Path(f"{name}() in line {node.lineno}").at("*", frozenset(loop.number for loop in self.loops))}
        objects = together.objects | ({name} if name else set())
        return replace(self.made_now(together), data=data, objects=objects, is_computed=True, is_distribution=False)

    def call_known(self, node: ast.Call, name: str, receiver: Value) -> Value:
        """Return the result of a call of a function of the script, and note what it does."""
        self.called.add(name)
        summary = self.known[name]
        parameters = [p for p in summary.parameters if p != "self"]
        given = dict(zip(parameters, node.args))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        values = {parameter: self.value(part) for parameter, part in given.items()}
        names = {p: {n.id for n in ast.walk(part) if isinstance(n, ast.Name)} for p, part in given.items()}
        data = union(*(values[p] for p in summary.data if p in values))
        self.inputs |= set().union(*(names[p] for p in summary.data & given.keys()))
        everything = union(receiver, *values.values())
        changed = {name_of(given[p]) for p in summary.updated if p in given} - {""}
        changed |= set(receiver.objects) if any(p.startswith("self.") for p in summary.updated) else set()
        if summary.scores and (changed or summary.trains) and summary.data & given.keys():
            texts = sorted(ast.unparse(part) for part in given.values())
            versions = sorted((n, self.versions.get(n, 0)) for n in set().union(*names.values()))
            self.calls.append(KnownCall(name, (*texts, *versions), self.branches, node.lineno))
        self.note_known(node, name, summary, data, changed, everything.objects)
        result = replace(self.made_now(data), objects=everything.objects | {name}, is_computed=True)
        if summary.scores:
            return replace(result, is_loss=True, is_each=summary.is_each)
        is_mixed = everything.is_mixed or summary.is_mixed
        is_hashed = (everything.is_hashed or summary.is_hashed) and is_mixed
        result = replace(result, data=everything.data, loops=everything.loops, is_mixed=is_mixed, is_hashed=is_hashed)
        if any(path.root == "arange()" for path in everything.data):
            return result
        return replace(result, keys=summary.keys, lookups=summary.lookups)

    def note_known(
        self, node: ast.Call, name: str, summary: Summary, data: Value, changed: set[str], objects: frozenset[str]
    ) -> None:
        """Note what a function of the script does, in its order."""
        train = summary.trains and data.data
        if train and summary.trains_first:
            self.note("train", data, node, frozenset({WEIGHTS}))
            self.time += 1
        if summary.scores and data.data:
            self.note("score", self.made_now(data), node, objects | {name}, name)
        if train and not summary.trains_first:
            self.time += 1
            self.note("train", data, node, frozenset({WEIGHTS}))
        if changed:
            self.note("update", data, node, frozenset(changed))

    def note_update(self, node: ast.Call, last: str, receiver: Value, arguments: list[Value]) -> None:
        value = union(*arguments)
        name = name_of(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if last in ACCUMULATORS and self.note_score(value, name, node):
            self.values[name] = union(self.values.get(name, Value()), replace(value, is_collected=True))
            return
        if last in ACCUMULATORS and last != "add_" and name:
            self.values[name] = union(self.values.get(name, Value()), value)
        objects = frozenset({name})
        if last == "at" and node.args:  # numpy.add.at(table, keys, values)
            objects = frozenset({name_of(node.args[0])})
        if value.data and name and name not in self.modules:
            self.note("count" if last in COUNTS else "update", value, node, objects)

    # ---------------------------------------------------------------- mixtures
    def holds_target(self, value: Value) -> bool:
        """Whether a value depends on the targets of a loss, or a part of them."""
        return any(overlap(path, target, frozenset()) for path in value.data for target in self.targets)

    def look_for_mixtures(self, node: ast.Call, last: str, receiver: Value, arguments: list[Value]) -> None:
        """Remark calls that choose between losses of a target: which one is better, only the target tells."""
        if last in ("min", "max", "minimum", "maximum", "fmin", "fmax", "amin", "amax"):
            losses = [value for value in arguments if value.is_each]
            differ = len(losses) > 1 and losses[0].objects != losses[1].objects
            if differ or union(receiver, *arguments).is_stack:
                self.remarks.append(("best", node.lineno))
        if last == "where" and len(arguments) == 3:
            self.check_choice(*arguments, node.lineno)

    def check_choice(self, condition: Value, one: Value, other: Value, line: int) -> None:
        """Remark a choice between two losses, or between a mixture and not, that depends on the target."""
        if not (one.is_each and other.is_each):
            return
        if condition.is_comparison and one.objects != other.objects:
            self.remarks.append(("best", line))
        elif self.holds_target(condition) and one.is_mixture != other.is_mixture:
            self.remarks.append(("choice", line))

    # ---------------------------------------------------------------- summary
    def summary(self) -> Summary:
        """Return what a call of this function does."""
        trains = [event for event in self.events if event.kind == "train" and event.data]
        scores = [event for event in self.events if event.kind == "score"]
        scored = frozenset().union(*(event.objects for event in scores))
        data = {path.root for event in (*trains, *scores) for path in event.data}
        data &= self.inputs | {path.root for path in self.targets}
        changes = [event for event in self.events if event.kind in ("update", "count")]
        updated = {name for event in changes for name in event.objects}
        own = {name for name in updated if name in self.parameters and name in scored or name.startswith("self.")}
        updated_data = {path.root for event in changes for path in event.data if event.objects & own}
        first_score = min((event.time for event in scores), default=self.time + 1)
        together = union(*self.returned)
        return Summary(
            self.parameters, bool(trains), bool(scores),
            bool(trains) and min(event.time for event in trains) < first_score,
            (data | updated_data) & set(self.parameters), own,
            any(value.is_mixed for value in self.returned),
            any(value.is_hashed for value in self.returned) or self.returns_cut(),
            any(value.is_each for value in self.returned),
            together.keys if are_nested(together.keys) else frozenset(),
            together.lookups if are_nested(together.lookups) else frozenset(),
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
    return name.rpartition(".")[2] in ("no_grad", "inference_mode", "set_grad_enabled")


def argument(node: ast.Call, position: int, keyword: str, values: list[Value]) -> Value:
    """Return the value of an argument that is given by its position or its name."""
    if len(node.args) > position:
        return values[position]
    names = [None] * len(node.args) + [part.arg for part in node.keywords]
    return values[names.index(keyword)] if keyword in names else Value()


def flows_of(tree: ast.Module) -> Iterator[Flow]:
    """Yield the flow of every function of a script, and of what is outside of functions, with what the functions do
    that they call."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    outside = ast.parse("def module(): pass").body[0]
    outside.body = tree.body
    functions.append(outside)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    criteria = set()
    for node in ast.walk(tree):
        made = node.value if isinstance(node, ast.Assign) else None
        if isinstance(made, ast.Call) and name_of(made.func).rpartition(".")[2] in CRITERIA:
            criteria |= {name_of(target).rpartition(".")[2] for target in node.targets}
    makers = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"Parameter"}
    known = {function.name: Summary([]) for function in functions[:-1]}
    for function in functions[:-1]:
        known[function.name].parameters = [argument.arg for argument in function.args.args]
    flows = [Flow(function, known, modules, criteria, makers) for function in functions]
    for _ in range(2):  # calls of calls: three levels of them
        now = {flow.function.name: flow.summary() for flow in flows[:-1]}
        changed = {name for name, summary in now.items() if summary != known[name]}
        known = now
        for index, flow in enumerate(flows):
            if flow.called & changed:
                flows[index] = Flow(flow.function, known, modules, criteria, makers)
    yield from flows
