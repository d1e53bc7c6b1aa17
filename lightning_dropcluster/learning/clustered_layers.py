"""The hooks of the chosen layers: labels are bound to them, and they are armed for each step."""

from collections.abc import Callable, Collection, Mapping
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_dropcluster import ranks
from lightning_dropcluster.layers.injection import HookedLayers, Injection, forget_compiled_code
from lightning_dropcluster.layers.selection import CONV_LAYERS, find_layers
from lightning_dropcluster.learning.clusters import Clusters, check_channels
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.methods import ClusterDrop


class ClusteredLayers(HookedLayers):
    """Hooked layers that drop their clusters.

    ``make_drop`` is `ClusterDrop` with the user's settings; how many clusters it has room for is said here.
    The regulariser of a hook is such a module, or ``None`` before the first window.
    """

    def __init__(self, grouping: Grouping, make_drop: Callable[..., ClusterDrop]) -> None:
        super().__init__()
        self._grouping, self._make_drop = grouping, make_drop
        self.device = torch.device("cpu")

    def attach(
        self, modules: Mapping[str, nn.Module], clusters: Mapping[str, Clusters], device: torch.device
    ) -> dict[str, Clusters]:
        """Hook the layers and return the clusters of those that have any, see `bind`."""
        self.device, self._injection = device, Injection(modules, dict.fromkeys(modules))
        bound = self.bind_all(clusters)
        self._injection.pause()
        self._injection.attach()
        return bound

    def bind_all(self, clusters: Mapping[str, Clusters]) -> dict[str, Clusters]:
        """Bind clusters that came from outside to those layers that are hooked."""
        names = [name for name in self.hooks if name in clusters]
        for name in names:
            check_channels(clusters[name], self._injection.layers[name], name)
            wanted, found = self.hooks[name].num_dims, clusters[name].shape
            if wanted is not None and len(found) != wanted - 1:
                raise ValueError(
                    f"labels of layer {name!r} are for features of shape {tuple(found)}, "
                    f"but the layer's have {wanted - 1} dimensions"
                )
        return {name: self.bind(name, clusters[name]) for name in names}

    def bind(self, name: str, clusters: Clusters) -> Clusters:
        """Write clusters into a layer's hook, in place where the table's shape allows.

        What is returned shares the hook's memory: labels are held once.
        """
        hook = self.hooks[name]
        drop = hook.regularizer
        if isinstance(drop, ClusterDrop) and drop.can_hold(clusters.table):
            drop.write_labels(clusters.table)
        else:
            if drop is not None:  # code for each size of labels would soon be more than torch keeps
                forget_compiled_code()
            hook.regularizer = drop = self._drop_of(clusters).to(self.device)
        hook.table_shape = tuple(clusters.table.shape)
        return Clusters(drop.labels, clusters.shape)

    def arm(self, drop_prob: float, clustered: Collection[str], *, gathers: bool) -> None:
        """Set what the hooks do in the coming step: drop the layers that have clusters, and gather."""
        for name, hook in self.hooks.items():
            used = drop_prob if name in clustered else 0.0
            hook.active, hook.first_call = used > 0.0 or gathers, True
            if hook.sketch is not None and hook.regularizer is None:
                # One variant less to compile: before the first clusters drop with probability 0.
                hook.regularizer = self._drop_of(self._one_cluster(hook.sketch.shape))
            if isinstance(hook.regularizer, ClusterDrop):
                hook.regularizer.set_drop_prob(used)
                hook.regularizer.inplace = _may_overwrite_output(self._injection.layers[name])

    def check_calls(self) -> None:
        """Refuse layers that see several numbers of channels, before labels of one meet the other."""
        scope = SCOPES[self._grouping.scope]
        for name, hook in self.hooks.items():
            other, shape = hook.other_channels, hook.shape
            if other is not None and shape is not None and scope.label_shape(shape)[0] > 1:
                raise ValueError(
                    f"layers: {name!r} is called several times in a step, with {shape[0]} and with {other} "
                    "channels, and has clusters for one number alone; choose other layers"
                )

    def make_sampler(self, model: nn.Module, clusters: Mapping[str, Clusters], drop_prob: float) -> Injection:
        """Make hooks, not attached yet, that drop clusters in eval mode too, with a draw for each sample."""
        if not clusters:
            raise ValueError("sampling: there are no clusters yet; fit first, or load a state")
        layers = find_layers(model, clusters)
        drops = {}
        for name, layer in layers.items():
            check_channels(clusters[name], layer, name)
            # An activation has no parameters of its own.
            weight = next(chain(layer.parameters(), model.parameters()), torch.empty(0))
            drops[name] = self._drop_of(clusters[name], per_sample=True, paired=False).to(weight.device)
            drops[name].set_drop_prob(drop_prob)
        return Injection(layers, drops, in_eval=True)

    def _one_cluster(self, shape: Shape) -> Clusters:
        """One cluster of everything, to stand in where nothing is dropped yet."""
        label_shape = SCOPES[self._grouping.scope].label_shape(shape)
        return Clusters(torch.zeros(label_shape, dtype=torch.uint8, device=self.device), shape)

    def _drop_of(self, clusters: Clusters, **settings: bool) -> ClusterDrop:
        drop = self._make_drop(
            clusters.table,
            0.0,
            num_clusters=max(self._grouping.clusters_for(clusters.shape), int(clusters.table.max()) + 1),
            per_map=SCOPES[self._grouping.scope].per_map,
            **settings,
        )
        drop.shift = ranks.draw_shift()
        return drop


def _may_overwrite_output(layer: nn.Module) -> bool:
    """A conv's backward pass does not need its output, nor does anybody else if no other hook saw it.

    One with a ``forward`` of its own may hand its input on.
    """
    is_a_conv = type(layer) in CONV_LAYERS and "forward" not in vars(layer)
    return is_a_conv and len(layer._forward_hooks) == 1 and not _global_forward_hooks
