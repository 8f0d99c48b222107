"""The service: bundles behind HTTP, on Ray Serve or in a single process.

::

    python -m serving runs/mnist                    # Ray Serve
    python -m serving runs/mnist --engine local     # one process, ready in a second, under 200 MB

What happens to a request, from the network inwards:

===================  ==================================================================================================
``app``              the routes; Starlette, knows nothing of Ray
``media``            Content-Type and Accept: which form a body has, and which its answer takes
``codec``            bytes <-> arrays: npy and JSON, strict
``errors``           what can go wrong, and the one JSON envelope in which it is told
===================  ==================================================================================================

What starts it:

===================  ==================================================================================================
``command_line``     the arguments, and what is checked before anything is started
``settings``         limits and everything else that the arguments decide
``address``          host and port, checked and claimed
``catalogue``        bundles -> encoders by name
``announcement``     the line on stdout that scripts wait for
``local_engine``     the application under uvicorn, in this process
``ray_environment``  what Ray reads when it is imported
``ray_engine``       starts and stops Ray and Serve
``deployment``       the application as a Ray Serve deployment
``proxy``            the edge, for Serve's proxy
===================  ==================================================================================================
"""
