"""Declared rewrite rules: a pattern, a check and a rewrite. A failed match is a value that names the reason and the node.

A rule is a class with three parts:

    class MergeTransposes(RewriteRule[MyContext, None]):
        pattern = NodePattern("Transpose", (NodePattern("Transpose", ("x",), name="inner"),))

        def check(self, match, context):
            return None if ... else MatchFailure.at("the permutation is unknown", match.node)

        def rewrite(self, match, context):
            ...

`RuleSet` applies rules to nodes. onnxscript's rewriter has the same three parts and is not used: on 7,888 nodes it takes 0.4 s
for one rule that matches nothing and 3.5 s for 20, where all of `fold` takes 0.3 s; it reports failed matches only to a tracer,
and not the names of inserted and removed nodes, which every pass records.

Patterns describe nodes by op and operands; attention and masks, which every exporter writes differently, are matched by code
that raises `PatternNotMatched`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ryzen_compile.spec.passes import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

Context = TypeVar("Context")
Result = TypeVar("Result")


@dataclass(frozen=True)
class MatchFailure:
    """Why a part of a model does not match a pattern."""

    reason: str
    location: str = ""
    """The name of the node or tensor at fault."""
    hint: str | None = None

    @classmethod
    def at(cls, reason: str, location: ir.Node | ir.Value, hint: str | None = None) -> MatchFailure:
        """Return the failure at a node or tensor; a node without a name is identified by its op type."""
        return cls(reason, _location_name(location), hint)

    @property
    def description(self) -> str:
        """The reason, followed by the location if it has a name."""
        return f"{self.reason} (`{self.location}`)" if self.location else self.reason

    def to_refusal(self) -> Refusal:
        """Return the refusal of a pass that this failure causes."""
        return Refusal(reason=self.reason, location=self.location, hint=self.hint)


class PatternNotMatched(Exception):
    """A part of a model does not match the pattern that a rewrite expects; raised by matchers of several levels.

    `str` of the exception is the reason.
    """

    def __init__(self, reason: str, location: str | ir.Node | ir.Value | None = None, hint: str | None = None) -> None:
        super().__init__(reason)
        self.failure = MatchFailure(reason, _location_name(location), hint)

    @property
    def reason(self) -> str:
        """The reason, without the location."""
        return self.failure.reason

    @property
    def location(self) -> str:
        """The name of the node or tensor at fault, or an empty string."""
        return self.failure.location

    @property
    def hint(self) -> str | None:
        """What the user can do, or None."""
        return self.failure.hint

    @property
    def description(self) -> str:
        """The reason, followed by the location if it has a name."""
        return self.failure.description

    def to_refusal(self) -> Refusal:
        """Return the refusal of a pass that this failure causes."""
        return self.failure.to_refusal()


@dataclass(slots=True)
class Match:
    """The nodes and tensors that a pattern matched."""

    node: ir.Node
    """The node that the root of the pattern matched."""
    values: dict[str, ir.Value] = field(default_factory=dict)
    """Name in the pattern -> tensor, without omitted inputs."""
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    """Name in the pattern -> node, for the inner nodes that have a name."""

    def __getitem__(self, name: str) -> ir.Value:
        """Return the tensor with this name in the pattern. Raises KeyError if the input is omitted."""
        return self.values[name]

    def get(self, name: str) -> ir.Value | None:
        """Return the tensor with this name in the pattern, or None if the input is omitted."""
        return self.values.get(name)


@dataclass(frozen=True)
class NodePattern:
    """A node in a pattern: its op, and a name or a further `NodePattern` for each input."""

    op_types: str
    """`Transpose`, or alternatives: `Reshape|Squeeze`."""
    inputs: tuple[str | NodePattern, ...] = ()
    """A name binds the input, the same tensor wherever the name recurs; `bias?` may be omitted. A last name with `*` stands
    for all further inputs, which are not bound. Without it, further inputs must be omitted."""
    domain: str = ""
    name: str = ""
    """The name of the node in `Match.nodes`; empty: not listed."""

    def alternatives(self) -> tuple[str, ...]:
        """Return the op types."""
        return tuple(self.op_types.split("|"))

    def match(self, node: ir.Node) -> Match | MatchFailure:
        """Match `node`, whose op is one of the alternatives, and the nodes that produce its inputs."""
        match = Match(node)
        return self._bind_inputs(node, match) or match

    def _bind_inputs(self, node: ir.Node, match: Match) -> MatchFailure | None:
        inputs = node.inputs
        for index, pattern in enumerate(self.inputs):
            value = inputs[index] if index < len(inputs) else None
            if not isinstance(pattern, str):
                failure = pattern._bind_producer(node, index, value, match)
                if failure is not None:
                    return failure
                continue
            if pattern[-1] == "*":
                return None
            if value is None:
                if pattern[-1] != "?":
                    return MatchFailure.at(f"has no input {index} (`{pattern}`)", node)
            elif match.values.setdefault(pattern.rstrip("?"), value) is not value:
                return MatchFailure.at(f"has different tensors for `{pattern}`", node)
        if any(value is not None for value in inputs[len(self.inputs) :]):
            return MatchFailure.at(f"has more than {len(self.inputs)} inputs", node)
        return None

    def _bind_producer(self, consumer: ir.Node, index: int, value: ir.Value | None, match: Match) -> MatchFailure | None:
        node = value.producer() if value is not None else None
        if node is None or node.domain != self.domain or node.op_type not in self.alternatives():
            return MatchFailure.at(f"input {index} is not the output of {self.op_types.replace('|', ' or ')}", consumer)
        if self.name:
            match.nodes[self.name] = node
        return self._bind_inputs(node, match)


class RewriteRule(abc.ABC, Generic[Context, Result]):
    """A rule: nodes that match `pattern` and pass `check` are rewritten.

    `Context` is what the rule reads and writes with, such as a `NodeBuilder`; `Result` is what `rewrite` returns.
    """

    pattern: ClassVar[NodePattern]

    def check(self, match: Match, context: Context) -> MatchFailure | None:
        """Return why a node that matches the pattern is not rewritten, or None. Must not modify the model."""

    @abc.abstractmethod
    def rewrite(self, match: Match, context: Context) -> Result:
        """Rewrite the matched nodes in place, or return the replacement for a caller that puts it in place."""

    def match(self, node: ir.Node, context: Context) -> Match | MatchFailure:
        """Return the match of `node`, or why it is not rewritten. A PatternNotMatched of `check` becomes a failure."""
        match = self.pattern.match(node)
        if isinstance(match, MatchFailure):
            return match
        try:
            failure = self.check(match, context)
        except PatternNotMatched as error:
            failure = error.failure
        return match if failure is None else failure


@dataclass(frozen=True)
class RuleOutcome(Generic[Context, Result]):
    """What the rules for one node did."""

    applied: RewriteRule[Context, Result] | None
    """The rule that rewrote the node, or None."""
    result: Result | None
    """What its `rewrite` returned."""
    failures: tuple[MatchFailure, ...]
    """Why the rules before it did not apply, in order."""


_NO_RULES: RuleOutcome[Any, Any] = RuleOutcome(None, None, ())


class RuleSet(Generic[Context, Result]):
    """Rules by the op of their root. Of several rules for one op, the first that matches is applied."""

    def __init__(self, *rules: RewriteRule[Context, Result]) -> None:
        self._rules: dict[tuple[str, str], tuple[RewriteRule[Context, Result], ...]] = {}
        for rule in rules:
            for op_type in rule.pattern.alternatives():
                key = (rule.pattern.domain, op_type)
                self._rules[key] = (*self._rules.get(key, ()), rule)

    def __iter__(self) -> Iterator[RewriteRule[Context, Result]]:
        """Iterate over the rules, each once."""
        return iter(dict.fromkeys(rule for rules in self._rules.values() for rule in rules))

    def has_rule_for(self, node: ir.Node) -> bool:
        """Return whether a rule has the op of `node` as its root."""
        return (node.domain, node.op_type) in self._rules

    def apply(self, node: ir.Node, context: Context) -> RuleOutcome[Context, Result]:
        """Rewrite `node` by the first rule that matches it."""
        rules = self._rules.get((node.domain, node.op_type))
        if rules is None:
            return _NO_RULES
        failures: list[MatchFailure] = []
        for rule in rules:
            match = rule.match(node, context)
            if isinstance(match, Match):
                return RuleOutcome(rule, rule.rewrite(match, context), tuple(failures))
            failures.append(match)
        return RuleOutcome(None, None, tuple(failures))


def _location_name(location: str | ir.Node | ir.Value | None) -> str:
    """Return the name of a node or tensor, the op type of a node without a name, or an empty string."""
    if location is None or isinstance(location, str):
        return location or ""
    op_type: str = getattr(location, "op_type", "")
    return location.name or op_type
