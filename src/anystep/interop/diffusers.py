"""A model as a pipeline of diffusers, sampled by its `FlowMapEulerDiscreteScheduler`.

Their flow maps run from sigma = 1 (noise) to sigma = 0 (data), a timestep being 1000 sigma, and
the network predicts dz/dsigma. So, for a step from `timestep` to `r_timestep`:

    t = 1 - timestep / 1000      d = (timestep - r_timestep) / 1000      prediction = -u(x, t, d)

Steps of powers of two are exact in both. Labels, guidance and the schedule of other step counts
are those of `anystep.sampling`, whose functions are called here: the same noise gives the same
pictures. Importing this module imports diffusers.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from anystep.errors import UserError
from anystep.guidance import guided
from anystep.interop.vae import VAE
from anystep.networks import NetworkConfig, build_model
from anystep.registry import from_json
from anystep.sampling import OWN_SEED, bounded, check_request, explain, may_guide, schedule
from anystep.spec import Model, ModelSpec

TIMESTEPS = 1000  # sigma = 1 is this timestep
Generators = torch.Generator | list[torch.Generator] | None
# diffusers asks of a component's module for the base class whose loading method it is to use.
__all__ = ["AnyStepNetwork", "AnyStepPipeline", "ModelMixin", "SchedulerMixin", "pipeline"]


class AnyStepNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A network and its spec as a model of diffusers.

    Args:
        network: `network` of a `model.json`.
        spec: `spec` of a `model.json`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, network: dict[str, Any], spec: dict[str, Any]) -> None:
        super().__init__()
        model = build_model(from_json(NetworkConfig, network), from_json(ModelSpec, spec))
        # Loading in another precision makes it the default, which fixed buffers do not follow.
        self.model = model.to(torch.get_default_dtype())

    @property
    def spec(self) -> ModelSpec:
        """What the network was trained on."""
        return self.model.spec

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        r_timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseOutput | tuple[Tensor]:
        """The average dz/dsigma from `timestep` down to `r_timestep`.

        Args:
            sample: (B, *shape).
            timestep: (B,) or a number, 1000 sigma.
            r_timestep: likewise, at most `timestep`.
            class_labels: class ids (B,), or None for the null label.
            return_dict: wrap it as `.sample`; a tuple otherwise.
        """
        start, end = (
            torch.as_tensor(time, device=sample.device).expand(len(sample)) / TIMESTEPS
            for time in (timestep, r_timestep)
        )
        u = self.model(sample, (1 - start).float(), (start - end).float(), class_labels)
        return BaseOutput(sample=-u) if return_dict else (-u,)


class AnyStepPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pictures in any number of steps.

    Args:
        transformer: the network.
        scheduler: the flow map's steps.
        vae: the autoencoder of a latent model.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: AnyStepNetwork,
        scheduler: FlowMapEulerDiscreteScheduler,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        batch_size: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        force_guidance: bool = False,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], Any] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            class_labels: class ids, one a picture or one for all; None is no condition.
            num_inference_steps: any whole number from 1.
            guidance_scale: strength w of u_null + w (u - u_null), 1 is none; applied as
                `anystep.sample` does, where the null label was trained and none is baked in.
            batch_size: how many pictures, where neither labels nor `latents` say so.
            generator: of the noise; of one seed it is the noise of `torch.randn`.
            latents: the noise (B, *shape) itself.
            output_type: "pil", "np" or "pt" in [0, 1], or "latent": what the network made.
            return_dict: wrap the pictures as `.images`; a tuple otherwise.
            force_guidance: apply guidance at every step.
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents": x}).

        Raises:
            UserError: labels, noise or a step count that do not fit the model.
        """
        x, cond = self.start(class_labels, batch_size, generator, latents)
        x = self.denoise(
            x,
            cond,
            num_inference_steps,
            (guidance_scale, force_guidance),
            generator,
            callback_on_step_end,
        )
        images = self.finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def start(
        self,
        labels: int | list[int] | Tensor | None,
        batch_size: int,
        generator: Generators,
        latents: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Noise (B, *shape), and class ids (B,) if any, on the pipeline's device."""
        spec, device, dtype = self.transformer.spec, self._execution_device, self.transformer.dtype
        cond = None if labels is None else torch.as_tensor(labels, device=device)
        if latents is not None:
            x = latents.to(device, dtype)
        else:
            n = batch_size if cond is None or cond.ndim == 0 else len(cond)
            x = randn_tensor((n, *spec.shape), generator, device, dtype)
        if cond is not None and cond.ndim == 0:
            cond = cond.expand(len(x))
        check_request(spec, x, cond)
        return x, cond

    def denoise(
        self,
        x: Tensor,
        cond: Tensor | None,
        steps: int,
        guidance: tuple[float, bool],
        generator: Generators,
        callback: Callable[[Any, int, Tensor, dict[str, Any]], Any] | None,
    ) -> Tensor:
        """Carry noise to samples; guidance is its strength, and whether it is forced."""
        spec, (strength, force) = self.transformer.spec, guidance
        to_end = spec.sampler == "consistency"  # each step goes to the end, and back with noise
        generator = generator or torch.Generator(x.device).manual_seed(OWN_SEED)
        self.scheduler.set_timesteps(
            sigmas=[1 - t for t, _ in schedule(steps, spec)], device=x.device
        )
        sigmas = self.scheduler.sigmas
        ends = torch.zeros_like(sigmas[1:]) if to_end else sigmas[1:]
        sizes = (sigmas[:-1] - ends).tolist()
        guide = [strength != 1 and (force or may_guide(spec, d)) for d in sizes]
        explain(spec, sizes, strength, guide)
        null = None if cond is None else torch.full_like(cond, spec.num_classes)
        for k, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            start, end = (s.expand(len(x)) * TIMESTEPS for s in (sigmas[k], ends[k]))
            w = strength if guide[k] else 1.0
            out = guided(self.predict, x, start, end, cond, guidance=w, null_cond=null)
            r_timestep = 0.0 if to_end else None  # None is the next of the schedule
            x = self.scheduler.step(out, timestep, x, r_timestep=r_timestep).prev_sample
            if to_end:
                noise = randn_tensor(tuple(x.shape), generator, x.device, x.dtype)
                x = bounded(x, spec.bound)
                x = self.scheduler.scale_noise(x, sigmas[k + 1] * TIMESTEPS, noise)
            if callback is not None:
                callback(self, k, timestep, {"latents": x})
        return x

    def predict(self, x: Tensor, start: Tensor, end: Tensor, cond: Tensor | None) -> Tensor:
        """The network as `anystep.guidance` calls one, with their times for t and d."""
        out: Tensor = self.transformer(x, start, end, cond).sample
        return out

    def finish(self, x: Tensor, output_type: str) -> Any:
        """Samples as what was asked for; those of a latent model decoded.

        Raises:
            UserError: they are no pictures.
        """
        spec = self.transformer.spec
        if output_type == "latent":
            return x
        if spec.vae is not None:
            x = self.vae.decode((x / spec.vae.scale + spec.vae.shift).to(self.vae.dtype)).sample
        elif spec.data == "raw":
            raise UserError("these samples are no pictures in [-1, 1]: ask output_type='latent'")
        return self.image_processor.postprocess(x, output_type)


def pipeline(model: Model, info: Mapping[str, Any], vae: VAE | None = None) -> AnyStepPipeline:
    """The pipeline of a model.

    Args:
        model: the model.
        info: its `model.json`.
        vae: its autoencoder, if it is a latent model.

    Raises:
        UserError: it predicts no velocity, or its samples are not shaped like pictures.
    """
    spec = model.spec
    if spec.predicts != "u":
        raise UserError(
            f"a flow map of diffusers predicts a velocity; this model predicts {spec.predicts}"
        )
    if len(spec.shape) != 3:
        raise UserError(f"a pipeline of diffusers makes pictures, not samples {spec.shape}")
    network = AnyStepNetwork(network=info["network"], spec=info["spec"])
    network.model.net.load_state_dict(model.net.state_dict())
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    if vae is not None:
        vae.net.register_to_config(_name_or_path="")  # it names a folder of this machine
    return AnyStepPipeline(network.eval(), scheduler, None if vae is None else vae.net)
