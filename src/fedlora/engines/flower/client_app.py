"""Hands a node's messages to the worker of its site, as Flower's ClientApp `app`.

Flower starts a new process for every message. It would take longer to import torch and to load a
base there than most rounds take, so the worker (`fedlora worker --site SITE.yaml`) stays, and this
process imports no more than it needs to carry bytes to the worker's socket and back.

A SuperNode says where its worker is called: `--node-config 'socket="/run/fedlora/clinic.sock"'`.
In a simulation the ServerApp has started the workers (`fedlora.engines.flower.simulation`).
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from fedlora.engines.flower.packets import answer_content, name_content, read_call
from fedlora.engines.flower.simulated_sockets import socket_of

app = ClientApp()


def worker_socket(context: Context) -> str:
    """Where this node's worker is called.

    Raises:
        SiteError: the SuperNode does not say so, and it is no simulation.
    """
    socket = context.node_config.get("socket")
    if socket:
        return str(socket)
    partition = context.node_config.get("partition-id")
    simulated = None if partition is None else socket_of(context.run_id, int(partition))
    if simulated is None:
        raise SiteError(
            "mistake",
            "the SuperNode does not say where its worker is called; start it with --node-config "
            "'socket=\"PATH\"', the socket of fedlora worker",
        )
    return str(simulated)


@app.query()  # type: ignore[untyped-decorator, unused-ignore]
def tell_name(message: Message, context: Context) -> Message:
    """Tell the name of this node's site: as its configuration says, or as its worker does."""
    try:
        name = context.node_config.get("name")
        content = name_content(str(name or carrier.status(worker_socket(context))["site"]))
    except SiteError as error:
        content = answer_content(error)
    return Message(content, reply_to=message)


@app.train()  # type: ignore[untyped-decorator, unused-ignore]
def carry(message: Message, context: Context) -> Message:
    """Have the worker answer a message."""
    packed, seconds = read_call(message.content)
    answer: bytes | SiteError
    try:
        answer = carrier.call(worker_socket(context), packed, seconds=seconds)
    except SiteError as error:
        answer = error
    return Message(answer_content(answer), reply_to=message)
