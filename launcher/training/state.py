"""The state of training: weights, optimizer and step as one plain pytree, created where it lives."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from launcher.config import TrainingConfig
from launcher.models import lora
from launcher.models.interface import BuildOptions, Decoder, Params
from launcher.models.lora import LoraOptions
from launcher.models.registry import FAMILIES
from launcher.training.mesh import Layout


class TrainState(NamedTuple):
    """Everything a checkpoint holds. The data state is `step` itself."""

    params: Params
    """The weights that are trained: all, or the adapters alone."""
    opt_state: Any
    step: jax.Array
    """int32 scalar: how many updates are done."""


class Blueprint(NamedTuple):
    """The model and its state without any array: code, shapes and shardings."""

    graph: nnx.GraphDef[Any]
    optimizer: optax.GradientTransformationExtraArgs
    layout: Layout
    config: TrainingConfig
    shardings: TrainState
    abstract: TrainState
    """ShapeDtypeStruct leaves that carry their shardings: the target of a restore and of ahead-of-time compilation."""
    frozen: Params
    """The same of the weights beside the adapters, which nothing changes, matrices in the compute type; empty without adapters."""

    def model(self, params: Params, frozen: Params) -> Decoder:
        """The decoder with these weights; for use inside a jitted function."""
        decoder: Decoder = nnx.merge(self.graph, lora.join(params, frozen))
        return decoder

    def init(self, params: Params | None = None) -> TrainState:
        """A new state, every shard created on its own device: no host ever holds the model whole. `params` (given up) instead of random
        weights.
        """
        if params is not None:
            return cast(TrainState, jax.jit(self._begin, out_shardings=self.shardings, donate_argnums=0)(params))
        seed = jax.random.key(self.config.trainer.seed)
        state: TrainState = jax.jit(self._init, out_shardings=self.shardings)(seed)
        return state

    def _init(self, key: jax.Array) -> TrainState:
        weights = _weights(_build(self.config, self.layout, key))
        return self._begin(lora.split(weights)[0] if self.frozen else weights)

    def _begin(self, params: Params) -> TrainState:
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))


def make_blueprint(config: TrainingConfig, layout: Layout, optimizer: optax.GradientTransformationExtraArgs) -> Blueprint:
    """Work out shapes and shardings; computes nothing."""
    model = nnx.eval_shape(lambda: _build(config, layout, jax.random.key(0)))
    weights = jax.tree.map(lambda x, sharding: abstract_array(x.shape, x.dtype, sharding), _weights(model), layout.params(model))
    params, frozen = lora.split(weights) if config.model.lora.rank else (weights, {})
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda kept, weight: weight.sharding if kept.shape == weight.shape else layout.replicated,  # factored moments are small
        opt_state,
        params,
        transform_non_params=lambda _: layout.replicated,
    )
    shapes = TrainState(params, opt_state, abstract_array((), jnp.int32, layout.replicated))  # type: ignore[arg-type]  # a shape in its array's place
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    shardings = TrainState(param_shardings, opt_shardings, layout.replicated)  # type: ignore[arg-type]  # a sharding in its array's place
    abstract = jax.tree.map(lambda x, sharding: abstract_array(x.shape, x.dtype, sharding), shapes, shardings)
    return Blueprint(nnx.graphdef(model), optimizer, layout, config, shardings, abstract, _narrowed(frozen, config))


def abstract_array(shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]  # JAX's


def _narrowed(frozen: Params, config: TrainingConfig) -> Params:
    """Nothing is added to frozen weights, so the type that they are computed in is enough; norms are computed in float32."""
    dtype = jnp.dtype(config.trainer.compute_dtype)
    narrowed: Params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "scale" else abstract_array(x.shape, dtype, x.sharding), frozen
    )
    return narrowed


def _build(config: TrainingConfig, layout: Layout, key: jax.Array) -> Decoder:
    options = BuildOptions(
        dtype=jnp.dtype(config.trainer.compute_dtype),
        remat=config.remat,
        constrain=layout.constrain,
        attention=layout.attention,
        vocabulary=layout.vocabulary,
        lora=_lora(config),
    )
    return FAMILIES[config.model.family].build(config.model.shape, key, options)


def _lora(config: TrainingConfig) -> LoraOptions | None:
    settings = config.model.lora
    if not settings.rank:
        return None
    tensors = FAMILIES[config.model.family].hf_tensors(config.model.shape)
    targets = frozenset(tensor.path[-2] for tensor in tensors if tensor.module in settings.targets)
    return LoraOptions(settings.rank, settings.scale, settings.dropout, targets)


def _weights(model: Decoder) -> Params:
    return dict(nnx.to_pure_dict(nnx.state(model)))
