"""The coordinator: one process for each run that mints generations, decides, and remembers.

    machine/     pure: a command and a time in, facts and effects out
    journal      the facts, in SQLite, before anything is answered
    devices      what devices did over all jobs, in a database of its own
    queries      state -> the messages that people ask for; live and offline alike
    service      gRPC in front of the machine
    scrape       Prometheus in front of the machine
    runtime      puts them together and executes effects in their order

It runs where torch is not installed.
"""
