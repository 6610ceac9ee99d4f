"""The matchers of the ``transformers`` package (checked against version 5.23)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detr_fast.integrations.adapter import Pairs, check_weights, match, pack
from detr_fast.ops import CostWeights

Targets = Sequence[Mapping[str, Tensor]]
Owner = TypeVar("Owner")


class HungarianMatcher(nn.Module):
    """DETR's: minus the softmax probability of the class, L1 and GIoU.

    Args:
        class_cost, bbox_cost, giou_cost: the weights.

    Raises:
        ValueError: all weights are zero.
    """

    def __init__(self, class_cost: float = 1, bbox_cost: float = 1, giou_cost: float = 1) -> None:
        super().__init__()
        check_weights(class_cost, bbox_cost, giou_cost)
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost

    @classmethod
    def like(cls, theirs: Any) -> HungarianMatcher:
        """With the weights of their matcher."""
        return cls(theirs.class_cost, theirs.bbox_cost, theirs.giou_cost)

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], targets: Targets) -> Pairs:
        """Match one decoder layer.

        Args:
            outputs: ``logits`` [B, Q, classes] and ``pred_boxes`` [B, Q, 4] cxcywh in [0, 1].
            targets: B dicts with "class_labels" [T] and "boxes" [T, 4] cxcywh in [0, 1].

        Returns:
            For each image (queries, targets), two int64 CPU tensors of length min(Q, T), the queries ascending.
        """
        logits, boxes = outputs["logits"], outputs["pred_boxes"]
        return match(logits, boxes, pack(targets, "class_labels", len(logits)), self.weights)

    @property
    def weights(self) -> CostWeights:
        return CostWeights(self.class_cost, self.bbox_cost, self.giou_cost)


class DeformableDetrHungarianMatcher(HungarianMatcher):
    """Deformable DETR's, Conditional DETR's and DAB-DETR's: the focal class term, alpha = 0.25 and gamma = 2."""

    @property
    def weights(self) -> CostWeights:
        return super().weights._replace(focal=True, alpha=0.25, gamma=2.0)


class LwDetrHungarianMatcher(DeformableDetrHungarianMatcher):
    """LW-DETR's, and RF-DETR's for detection: Deformable DETR's cost, for groups of queries."""

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], targets: Targets, group_detr: int) -> Pairs:  # type: ignore[override]
        """Match one decoder layer.

        Args:
            outputs, targets: as DETR's.
            group_detr: how many groups of Q // group_detr queries are matched, each with all targets.

        Returns:
            For each image (queries, targets), two int64 CPU tensors: group after group, each of length
            min(Q // group_detr, T), the queries ascending.
        """
        logits, boxes = outputs["logits"], outputs["pred_boxes"]
        packed = pack(targets, "class_labels", len(logits))
        return match(logits, boxes, packed, self.weights, group_detr=group_detr)


class RTDetrHungarianMatcher(HungarianMatcher):
    """RT-DETR's, D-FINE's and DEIMv2's: the focal class term or the softmax's, as the configuration says.

    Args:
        config: has ``matcher_class_cost``, ``matcher_bbox_cost``, ``matcher_giou_cost``, ``use_focal_loss``,
            ``matcher_alpha`` and ``matcher_gamma``.

    Raises:
        ValueError: all weights are zero.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config.matcher_class_cost, config.matcher_bbox_cost, config.matcher_giou_cost)
        self.use_focal_loss = config.use_focal_loss
        self.alpha = config.matcher_alpha
        self.gamma = config.matcher_gamma

    @classmethod
    def like(cls, theirs: Any) -> RTDetrHungarianMatcher:
        """With the weights of their matcher."""
        names = ("class_cost", "bbox_cost", "giou_cost", "alpha", "gamma")
        values = {f"matcher_{name}": getattr(theirs, name) for name in names}
        return cls(SimpleNamespace(use_focal_loss=theirs.use_focal_loss, **values))

    @property
    def weights(self) -> CostWeights:
        return super().weights._replace(focal=self.use_focal_loss, alpha=self.alpha, gamma=self.gamma)


MATCHERS: dict[str, type[HungarianMatcher]] = {
    matcher.__name__: matcher
    for matcher in (
        HungarianMatcher,
        DeformableDetrHungarianMatcher,
        LwDetrHungarianMatcher,
        RTDetrHungarianMatcher,
    )
}


def use_in(owner: Owner) -> Owner:
    """Have a model or a criterion of transformers match by this library: ``model = use_in(model)``.

    A criterion gets one of the matchers above, with the weights of its own. A model has none to give: its
    ``loss_function`` makes matcher and criterion anew in every step. The model gets a ``loss_function`` that does
    the same and then calls ``use_in`` on the criterion; other models and the package itself stay as they are.

    Args:
        owner: changed in place. Once more changes nothing.

    Returns:
        ``owner``.

    Raises:
        NotImplementedError: its matcher is none of the above: that of a model for masks or for text, whose costs have
            other terms. For a model this is known only when it computes a loss.
        TypeError: ``owner`` has neither ``matcher`` nor ``loss_function``.
    """
    changed: Any = owner
    if hasattr(changed, "matcher"):
        changed.matcher = _ours(changed.matcher)
    elif hasattr(changed, "loss_function"):
        if not isinstance(changed.loss_function, LossFunction):
            changed.loss_function = LossFunction(changed.loss_function)
    else:
        raise TypeError(f"owner must have a matcher or a loss_function, got {type(owner).__name__}")
    return owner


def _ours(theirs: Any) -> HungarianMatcher:
    name = type(theirs).__name__
    if name not in MATCHERS:
        raise NotImplementedError(f"there is no matcher here for the cost of {name}, only for {', '.join(MATCHERS)}")
    return MATCHERS[name].like(theirs)


class LossFunction:
    """A loss function of transformers whose criterion matches by this library. Can be copied and pickled.

    Args:
        theirs: the function, which calls a criterion's class (one of its module's, with "Loss" at the end of its name).

    Raises:
        NotImplementedError: it calls none.
    """

    def __init__(self, theirs: FunctionType) -> None:
        self.theirs = theirs
        self._function = _with_our_criterion(theirs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[type[LossFunction], tuple[FunctionType]]:
        return type(self), (self.theirs,)


def _with_our_criterion(theirs: FunctionType) -> FunctionType:
    """The function with a dictionary of global names of its own, in which the criterion's makes one that we changed."""
    made = {name: theirs.__globals__.get(name) for name in theirs.__code__.co_names if name.endswith("Loss")}
    criteria = {name: _then_ours(kind) for name, kind in made.items() if isinstance(kind, type)}
    if not criteria:
        raise NotImplementedError(f"{theirs.__name__} makes no criterion whose matcher could be replaced")
    names = {**theirs.__globals__, **criteria}
    function = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    function.__kwdefaults__ = theirs.__kwdefaults__
    return function


def _then_ours(criterion: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda *args, **kwargs: use_in(criterion(*args, **kwargs))
