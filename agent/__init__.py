"""The agent: one daemon per node and job that outlives the trainers and holds their snapshots.

``protocol`` decides (pure), ``arenas`` owns the shared memory, ``service`` speaks gRPC, ``daemon`` is the process;
``client`` and ``launch`` are what trainers and the command line use to find, start and talk to it. No torch here.
"""
