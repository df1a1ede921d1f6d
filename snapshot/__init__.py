"""Snapshots of one rank: what they hold, where their bytes lie, when they may be overwritten, which can be restored.

The nouns (design glossary): a *snapshot* is the state of all ranks at one (run, step); an *image* is one rank's bytes of
it; a *layout* says which slice of which tensor lies at which offset of the image; an *arena* is one rank's shared
memory, made of *slots*; each slot holds one image, its tables and its *record*.

Pure decisions: ``partition`` (who copies which rows), ``slots`` (where a slot stands), ``beat`` (do all ranks snapshot
this step), ``recovery`` (which step comes back, from where). Formats: ``layout``, ``codec``, ``record``. Shared
memory: ``arena``. torch is known to ``state``, ``capture`` and ``live`` only.
"""
