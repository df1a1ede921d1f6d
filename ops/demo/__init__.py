"""``holdfast demo``: train, kill, restart, and compare with the run that nobody disturbed.

A *reference* run trains without any checkpointing. An *attacked* run of the same seed trains with a Checkpointer while
the driver kills its processes, or whole simulated nodes with their memory; or has it preempted, and takes all machines away
once it has ended by itself. ``verdict`` then compares every loss and the final state, bit for bit.

``text`` and ``model`` say what is trained, ``training`` how, ``worker`` is the script that runs once per rank. ``nodes`` are
the places where ranks run, ``launcher`` starts them there. ``journal`` is what a run leaves on disk, ``schedule`` decides when
to kill what, ``victims`` finds and kills it, ``driver`` runs both runs, ``verdict`` judges, ``plot`` and ``command`` show.
Only ``text``, ``model`` and ``training`` know torch.
"""
