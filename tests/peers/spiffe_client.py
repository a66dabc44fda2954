"""PyPI `spiffe`, which stands on gRPC's C core, as a consumer: says what it is given, one JSON object a line.

usage: spiffe_client.py unix:/PATH TRUST_DOMAIN; ends when its standard input is closed.
"""

import json
import logging
import random
import sys
import threading
import time

import grpc
from spiffe import TrustDomain, WorkloadApiClient, X509Source


def say(**what):
    print(json.dumps(what), flush=True)


def error(call):
    try:
        return f"no error but {call()}"
    except Exception as e:
        return f"{e} {e.__cause__}"


def many_calls(n):
    """Calls with metadata of all sizes on one connection: the table of HPACK fills, and what is in it goes again."""
    dice = random.Random(1)
    with grpc.insecure_channel(endpoint) as channel:
        call = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509Bundles")
        for _ in range(n):
            text = "".join(dice.choices("abc%2F/:authority", k=dice.choice([0, 10, 100, 1000, 5000])))
            names = ("workload.spiffe.io", "true"), (f"x-{dice.randrange(9)}", text), ("authority", text[:9])
            answer = call(b"", metadata=names, timeout=10)
            assert next(answer)
            answer.cancel()
    return n


logging.basicConfig(level=logging.CRITICAL)
endpoint, trust_domain = sys.argv[1], TrustDomain(sys.argv[2])
client = WorkloadApiClient(endpoint, default_timeout=10)
svid = client.fetch_x509_svid()
say(
    id=str(svid.spiffe_id),
    chain=len(svid.cert_chain),
    calls=many_calls(300),
    bundles=[str(b.trust_domain) for b in client.fetch_x509_bundles().bundles],
    jwt_svid=error(lambda: client.fetch_jwt_svid(audience={"a"})),
    jwt_bundles=error(lambda: client.fetch_jwt_bundles()),
    jwt_validate=error(lambda: client.validate_jwt_svid("a.b.c", "a")),
)
client.close()

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
source = X509Source(WorkloadApiClient(endpoint), timeout_in_seconds=10)
seen = None
while not ended.is_set():
    context = source.get_x509_context()
    roots = context.x509_bundle_set.get_bundle_for_trust_domain(trust_domain).x509_authorities
    now = {"serial": format(context.default_svid.cert_chain[0].serial_number, "x"), "roots": len(roots)}
    if now != seen:
        say(**now)
        seen = now
    time.sleep(0.01)
