"""The service: bundles behind HTTP and gRPC, on Ray Serve or in a single process.

::

    python -m serving runs/mnist                    # Ray Serve
    python -m serving runs/mnist --engine local     # one process, ready in a second

What happens to a request, from the network inwards:

======================  ===============================================================================================
``connection``          (``head``) HTTP/1.1: heads, bodies, answers, all bounded in bytes and time
``app``                 routes, errors in each door's form; knows nothing of Ray
``exchange``            one request and its answer; ``asgi`` carries it where another server has the connection
``guard``               who may come in: lengths, keys, rates, room
``native``              ``/v1/embed``, ``/v1/predict``; ``media``, ``codec``, ``multipart``: bytes <-> arrays
``embeddings``          ``/v1/embeddings``, OpenAI's form
``inference``           ``/v2``, the Open Inference Protocol
``meta``                index, health, models, figures; ``openapi`` describes everything
``protocols``           what travels over the wire, as pure functions; the protocol's gRPC service
``service``             the one way from rows or images to features
``batcher``, ``batch``  rows of many requests -> batches -> features of each
``models``              what is served: versions, loaded, exchanged; ``served_model`` one of them, proved
``watching``            figures, drift, traces, logs
``errors``              what can go wrong, and how it is told
======================  ===============================================================================================

What starts it:

======================  ===============================================================================================
``command_line``        the arguments, and what is checked before anything is started
``settings``            limits and everything else that the arguments decide
``address``             host and port, checked and claimed
``announcement``        the line on stdout that scripts wait for
``http_server``         accepts connections, keeps their deadlines, stops in order; gRPC beside it
``local_engine``        in this process
``ray_environment``     what Ray reads when it is imported
``ray_engine``          starts and stops Ray and Serve
``desk``                hands the listening socket to the replicas
``accepting``           how replicas share out the connections
``deployment``          a replica
======================  ===============================================================================================
"""
