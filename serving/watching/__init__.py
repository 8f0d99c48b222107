"""What the operator sees of the service: metrics, drift, traces, logs.

Nothing here holds a payload or a key, and nothing here decides anything.
"""
