"""Whether a module's own parameters can be followed, instead of running its call again."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Lift:
    """A call in a pass that is watched, in which it is tried to follow the module's parameters.

    Following tells as much as running the call again, at the price of what the parameters are used
    in. It is given up where an operation is not seen or fits no sample, or where it would be
    differentiated once for each sample:

        x * self.gamma               followed: each sample's part is a sum of products
        conv2d(x, standardised(w))   run again: a convolution for each sample costs more than that
        Custom.apply(x, self.gamma)  run again: for all samples at once, where a module allows it

    Attributes:
        names: The parameters.
        given_up: Whether the call is to be run again.
        operations: What parameters met samples in, with whether it has a closed form, by name.
        accounts: The names under which what arrives for them is compared with autograd's gradients.
    """

    names: frozenset[str]
    given_up: bool = False
    operations: dict[str, dict[str, bool]] = field(default_factory=dict)
    accounts: set[str] = field(default_factory=set)
