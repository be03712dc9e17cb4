"""Replays rounds of transfers in SimGrid; runs in the Python that has its bindings (Debian: python3-simgrid).

stdin: {"config": ["key:value"], "hosts": n, "bandwidths": [bytes/s of each directed link], "latencies": [s],
"routes": [[source, destination, [links]]], "patterns": {name: [rounds of [source, destination, bytes]]}}.
stdout: {"seconds": {name: [rounds of [seconds of each message]]}, "wall_s": of the simulation}.
A barrier after each round: it ends when all its messages have arrived.
"""

import json
import sys
import time

import simgrid


def platform(engine: simgrid.Engine, hosts: int, bandwidths: list, latencies: list, routes: list) -> list:
    """One zone with a route for every pair that talks, over those directed links and no others."""
    zone = simgrid.NetZone.create_full_zone("zone")
    chips = [zone.create_host(f"chip{chip}", 1e9) for chip in range(hosts)]
    up = simgrid.LinkInRoute.Direction.UP  # a directed link is one half of a split-duplex one
    links = []
    for number, (bandwidth, latency) in enumerate(zip(bandwidths, latencies, strict=True)):
        link = zone.create_split_duplex_link(f"link{number}", bandwidth)
        link.set_latency(latency).seal()
        links.append(simgrid.LinkInRoute(link, up))
    for source, destination, way in routes:
        ends = chips[source].netpoint, chips[destination].netpoint
        zone.add_route(*ends, None, None, [links[link] for link in way], False)
    zone.seal()
    return chips


def replay(chips: list, patterns: dict, seconds: dict) -> None:
    for name, rounds in patterns.items():
        seconds[name] = []
        for transfers in rounds:
            begin = simgrid.Engine.clock
            comms = [simgrid.Comm.sendto_async(chips[s], chips[d], nbytes) for s, d, nbytes in transfers]
            simgrid.Comm.wait_all(comms)
            seconds[name].append([comm.finish_time - begin for comm in comms])


def main() -> None:
    wanted = json.load(sys.stdin)
    engine = simgrid.Engine(["replay", *(f"--cfg={item}" for item in wanted.pop("config")), "--log=root.thres:error"])
    patterns, seconds = wanted.pop("patterns"), {}
    chips = platform(engine, **wanted)
    simgrid.Actor.create("replay", chips[0], replay, chips, patterns, seconds)
    begin = time.perf_counter()
    engine.run()
    json.dump({"seconds": seconds, "wall_s": time.perf_counter() - begin}, sys.stdout)


if __name__ == "__main__":
    main()
