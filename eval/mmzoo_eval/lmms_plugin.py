"""The zoo as a model of lmms-eval: `lmms-eval --model mmzoo --model_args name=aki-4b ...`.

lmms-eval finds `manifest` by the entry point "lmms_eval.models" of this distribution. Checked with lmms-eval 0.7.3.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

import mmzoo
from mmzoo.errors import InputError
from mmzoo_eval.lmms import Asked, Asker, Rounds, framed, visual_messages


def manifest() -> ModelManifest:
    """What lmms-eval is told: the chat form by default, the simple one with --force_simple."""
    here = "mmzoo_eval.lmms_plugin"
    return ModelManifest(model_id="mmzoo", simple_class_path=f"{here}.Simple", chat_class_path=f"{here}.Chat")


class _Zoo(lmms):
    """A model of the zoo.

    Args:
        name: as `mmzoo.load` takes it: a registered name, "hf-hub:org/name" or a folder.
        weights: likewise.
        device: "cpu", "cuda" ...; the one that accelerate gives this process if None.
        device_map: of transformers, in place of a device.
        dtype: "float32", "bfloat16" ...; the checkpoint's own if None.
        attention: as `mmzoo.load` takes it.
        batch_size: requests of a batch.
        system_prompt: a text, or a file that holds it, in place of tasks' and the family's own.
        num_frames: frames of a video, in place of the family's own number; its rule stays.
        deadline: seconds after which a video is given up.
        ignore: generation options of tasks that shall be left out, joined by "+".

    Raises:
        InputError: an argument that is none of these, or that cannot be used.
    """

    def __init__(
        self,
        name: str,
        weights: str = "default",
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        attention: str = "sdpa",
        batch_size: int | str = 1,
        system_prompt: str | None = None,
        num_frames: int | None = None,
        deadline: float = 120.0,
        ignore: str = "",
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            taken = [one for one in inspect.signature(type(self)).parameters if one != "unknown"]
            raise InputError(f"The model mmzoo takes no argument {', '.join(unknown)}. It takes {', '.join(taken)}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is a number from 1 on, not {batch_size!r}.")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        precision = getattr(torch, dtype, None) if dtype else None
        if dtype and not isinstance(precision, torch.dtype):
            raise InputError(f"torch has no dtype {dtype!r}. Take float32, bfloat16 or float16.")
        where = _place(device, device_map, self.accelerator)
        model = mmzoo.load(name, weights, dtype=precision, attention=attention, **where)
        if num_frames is not None:
            if num_frames < 1:
                raise InputError(f"num_frames is a number from 1 on, not {num_frames!r}.")
            model.processor.num_frames = num_frames
        self.device, self.batch_size = model.device, int(batch_size)
        system = self._resolve_system_prompt(system_prompt) if system_prompt is not None else None
        left_out = [option for option in ignore.split("+") if option]
        self.asker = Asker(model, self.batch_size, system, deadline, left_out, quiet=self._rank != 0)

    def clean(self) -> None:
        """Lets go of the model: lmms-eval calls this when everything is answered, to make room for a judge."""
        del self.asker
        super().clean()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Mean loss of each request's continuation, and whether greedy decoding would say it; see `Asker.losses`.

        Raises:
            InputError: acc_mutual_info is wanted. It reads likelihoods where lmms-eval's other metrics read losses.
        """
        asked, continuations = [], []
        for request in requests:
            if len(request.args) == 2:
                raise InputError(
                    f"{_named(request)}: acc_mutual_info cannot stand beside losses. Leave this metric out."
                )
            text, continuation, doc_to_visual, *place = request.args
            continuations.append(continuation(self._doc(*place)) if callable(continuation) else continuation)
            asked.append(self._simply(request, text, {}, doc_to_visual, *place))
        # 0.7.3 turns a bare tuple into its repr, which no metric can read. What a GenerationResult holds stays.
        return [GenerationResult(pair) for pair in self.asker.losses(asked, continuations)]

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _simply(
        self, request: Instance, text: str, options: Any, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> Asked:
        """A request of the simple form."""

        def messages() -> list[Any]:
            visuals = doc_to_visual(self._doc(doc_id, task, split)) if callable(doc_to_visual) else None
            return framed(visual_messages(visuals, text), request.metadata)

        return Asked(_named(request), text, messages, options or {})


class Simple(_Zoo):
    """Requests as a text and visuals, which stand before it."""

    is_simple = True

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        return self.asker.generate([self._simply(request, *request.args) for request in requests])

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds; what earlier rounds said is in a later one if the task puts it there."""
        return self.asker.generate_rounds([self._rounds(request, *request.args) for request in requests])

    def _rounds(
        self, request: Instance, text: str, options: Any, doc_to_visual: Any, doc_to_text: Any, *place: Any
    ) -> Rounds:
        def following(**known: Any) -> tuple[Any, bool, Any, Any]:
            visuals, text, over, said, info = _round(doc_to_text(self._doc(*place), **known), 5)
            return framed(visual_messages(visuals, text), request.metadata), over, said, info

        return Rounds(self._simply(request, text, options, doc_to_visual, *place), following)


class Chat(_Zoo):
    """Requests as messages. Several turns need a family whose processor is `multi_turn`."""

    is_simple = False

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        return self.asker.generate([self._asked(request, *request.args) for request in requests])

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds; what earlier rounds said is in a later one if the task puts it there."""
        return self.asker.generate_rounds([self._rounds(request, *request.args) for request in requests])

    def _asked(self, request: Instance, text: str, doc_to_messages: Any, options: Any, *place: Any) -> Asked:
        def messages() -> Any:
            return framed(doc_to_messages(self._doc(*place)), request.metadata)

        return Asked(_named(request), text, messages, options or {})

    def _rounds(self, request: Instance, text: str, doc_to_messages: Any, options: Any, *place: Any) -> Rounds:
        def following(**known: Any) -> tuple[Any, bool, Any, Any]:
            messages, over, said, info = _round(doc_to_messages(self._doc(*place), **known), 4)
            return None if over else framed(messages, request.metadata), over, said, info

        return Rounds(self._asked(request, text, doc_to_messages, options, *place), following)


def _named(request: Instance) -> str:
    found = request.metadata
    return f"Document {found['doc_id']} of {found['task']} ({found.get('split', 'no split')})"


def _round(found: Any, parts: int) -> tuple[Any, ...]:
    if not isinstance(found, tuple) or len(found) != parts:
        raise InputError(
            f"A task of several rounds makes each of {parts} parts, with whether it is over; not {found!r}."
        )
    return found


def _place(device: str | None, device_map: str | None, accelerator: Accelerator) -> dict[str, Any]:
    """Where the model is put, as `mmzoo.load` takes it."""
    if device_map and device:
        raise InputError(f"device_map={device_map} spreads the model over devices. Leave device={device} out.")
    numbered = device is not None and torch.device(device).index is not None
    if accelerator.num_processes > 1 and (device_map or numbered):
        raise InputError("Several processes each take a device of their own. Leave device_map and device out.")
    return {"device_map": device_map} if device_map else {"device": device or accelerator.device}
