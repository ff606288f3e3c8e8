"""Many models by one file: what each takes, job files for an engine that exists, where each model stands.

Nothing here schedules: an engine of the table queues, places, ends and starts jobs again. A job is `qtool run`, whose
keys see to it that nothing is made twice, and which goes on where a killed one stopped.
"""
