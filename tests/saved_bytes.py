"""What tensors take, and what autograd keeps of a forward pass, for the tests of plans."""

import torch

from internvl.compute import compilation


def kept(model, run):
    """Bytes that autograd keeps of `run`, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), compilation.tracing():
        run().backward()  # compiled, if at all
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run()
    del loss
    return sum(found.values())


def bytes_of(tensors):
    """Bytes of the elements, views of one buffer each counted."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
