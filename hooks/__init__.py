"""Hooks into the training loop: ``Checkpointer``, and what it is made of.

``ranks`` is how ranks talk, ``pulse`` drives the beat, ``holding`` keeps this rank's slots together with the agent,
``binder`` follows the state's layout, ``restore`` brings a snapshot back.
"""
