"""The twin: its solver against plain numpy, its series and cache, and the statistics of the real place."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jax_repaint.data import twin
from jax_repaint.data.twin import Forcing, State, Twin
from jax_repaint.errors import InputError
from jax_repaint.structures import divergence_vorticity

pytestmark = pytest.mark.usefixtures("optimised")

SMALL = Twin(eddies=4)
Y, X = twin.GRID
FACES = (0, 1), (1, 0)  # of u and v
run = jax.jit(
    lambda parameters, sea, state, forcing, count: jax.lax.fori_loop(
        0, count, lambda _, s: twin.step(parameters, sea, s, forcing), state
    ),
    static_argnums=0,
)


def still(sea):
    return State(*(jnp.zeros(sea.ocean.shape) for _ in range(3)))


def forced(u, v):
    """Prescribed velocity without body forces."""
    return Forcing((u, v), (jnp.zeros(u.shape), jnp.zeros(v.shape)))


def noise(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.2, shape) for shape in shapes]


def divergence(u, v):
    return np.diff(u, axis=-1) + np.diff(v, axis=-2)


@pytest.fixture(scope="module")
def driven():
    """The sea after 40 steps under modes and eddies, and the velocity outside."""
    g, sea = twin.geometry(SMALL), twin.sea(SMALL)
    outside = twin.eddies(SMALL, window=3, hours=1)
    modes = twin.flatten(g.modes_u, "edge"), twin.flatten(g.modes_v, "edge")
    external = tuple(0.3 * jnp.asarray(e[0]) + 0.2 * jnp.asarray(m[0]) for e, m in zip(outside, modes, strict=False))
    return run(SMALL, sea, still(sea), forced(*external), 40), external


def test_nothing_flows_through_the_coast(driven):
    g, (after, _) = twin.geometry(SMALL), driven
    for q, faces, is_open in zip(after[:2], FACES, (g.open_u, g.open_v), strict=True):
        q = np.asarray(twin.unflatten(q, faces))
        np.testing.assert_array_equal(q[is_open == 0], 0)
        assert np.abs(q[is_open == 1]).mean() > 0.01
    np.testing.assert_array_equal(twin.unflatten(after.eta)[~g.ocean], 0)


@pytest.mark.parametrize("side", ["west", "south", "east"])
def test_the_rim_follows_the_outside(driven, side):
    g, (after, external) = twin.geometry(SMALL), driven
    k, where = {"west": (0, np.s_[:, 0]), "east": (0, np.s_[:-1, -1]), "south": (1, 0)}[side]
    q, given = (np.asarray(twin.unflatten(x[k], FACES[k]))[where] for x in (after, external))
    is_open = (g.open_u, g.open_v)[k][where] == 1
    assert np.abs(given[is_open]).mean() > 0.01
    np.testing.assert_array_equal(q[is_open], given[is_open])


def test_the_north_rim_is_a_wall(driven):
    after, _ = driven
    np.testing.assert_array_equal(np.asarray(twin.unflatten(after.v, FACES[1]))[-1], 0)


def test_a_gravity_step_is_the_one_of_two_dimensional_arrays():
    g, sea, dt = twin.geometry(SMALL), twin.sea(SMALL), 7.5
    shapes = (Y, X + 1), (Y + 1, X)
    u, v, push_u, push_v, outer_u, outer_v, eta = noise(0, *shapes, *shapes, *shapes, (Y, X))
    push_u, push_v, eta = push_u / 100, push_v / 100, eta * g.ocean
    u, v = u * g.open_u, v * g.open_v
    slow = tuple(twin.flatten(p)[twin.INNER : -twin.INNER] for p in (push_u, push_v))
    state = State(*(jnp.asarray(twin.flatten(q)) for q in (u, v, eta)))
    forcing = forced(*(jnp.asarray(twin.flatten(q)) for q in (outer_u, outer_v)))
    after = jax.jit(twin.gravity_waves, static_argnums=0)(SMALL, sea, state, slow, forcing, dt, 1)

    # Pressure g' eta - nu_d div u, nu_d = damping dx^2 / dt.
    p = 9 / g.depth.max() * eta - 0.1 * 50**2 / dt * divergence(u, v) / 50 * g.ocean
    new_u, new_v = (np.asarray(twin.unflatten(q, f), np.float64) for q, f in zip(after[:2], FACES, strict=True))
    expected_u = g.open_u[:, 1:-1] * (u[:, 1:-1] + dt * (push_u[:, 1:-1] - np.diff(p, axis=1) / 50))
    expected_v = g.open_v[1:-1] * (v[1:-1] + dt * (push_v[1:-1] - np.diff(p, axis=0) / 50))
    np.testing.assert_allclose(new_u[:, 1:-1], expected_u, atol=1e-6)
    np.testing.assert_allclose(new_v[1:-1], expected_v, atol=1e-6)

    moved = np.asarray(twin.unflatten(after.eta), np.float64) - np.float32(eta)
    free = g.ocean & (g.sponge == 0)
    outflow = divergence(g.depth_u * new_u, g.depth_v * new_v) / 50
    assert np.abs(moved[free]).mean() > 0.1
    np.testing.assert_allclose(moved[free], -dt * outflow[free], atol=1e-5)
    relaxed = -dt * (outflow + 0.2 * g.sponge * eta)
    np.testing.assert_allclose(moved[g.ocean], relaxed[g.ocean], atol=1e-5)


def test_accelerations_are_those_of_the_equations():
    """In each face of open water by itself: upwind advection on four points, drag, viscosity, rotation, relaxation."""
    parameters, h = Twin(eddies=4, friction=0.4, viscosity=40.0, f=0.02), 50.0
    g, sea = twin.geometry(parameters), twin.sea(parameters)
    shapes = (Y, X + 1), (Y + 1, X)
    u, v, outer_u, outer_v, push_u, push_v = noise(1, *shapes, *shapes, *shapes)
    state = State(*(jnp.asarray(twin.flatten(q)) for q in (u, v, np.zeros((Y, X)))))
    forcing = Forcing(
        *(tuple(jnp.asarray(twin.flatten(q)) for q in pair) for pair in ((outer_u, outer_v), (push_u, push_v)))
    )
    made = jax.jit(twin._slow, static_argnums=0)(parameters, sea, state, forcing)
    made = [twin.unflatten(jnp.pad(part, twin.INNER), faces) for part, faces in zip(made, FACES, strict=True)]

    def derivative(q, at, speed, axis):
        step = np.eye(2, dtype=int)[axis] * (1 if speed > 0 else -1)
        # Third order: two points upstream, one downstream.
        far, near, here, ahead = (q[tuple(np.add(at, k * step))] for k in (-2, -1, 0, 1))
        return (far - 6 * near + 3 * here + 2 * ahead) / (6 * h) * (1 if speed > 0 else -1)

    components = ((u, outer_u, push_u, g.depth_u, g.sponge_u), (v, outer_v, push_v, g.depth_v, g.sponge_v))
    rng = np.random.default_rng(2)
    for k, (q, outer, push, depth, sponge) in enumerate(components):
        for y, x in [(4, 4), (30, 3), *zip(rng.integers(2, Y - 2, 60), rng.integers(2, X - 2, 60), strict=True)]:
            if k == 0:
                east, north = u[y, x], v[y : y + 2, x - 1 : x + 1].mean()
                rotation = 0.02 * north
            else:
                east, north = u[y - 1 : y + 1, x : x + 2].mean(), v[y, x]
                rotation = -0.02 * east
            advection = east * derivative(q, (y, x), east, 1) + north * derivative(q, (y, x), north, 0)
            spread = 40 / h**2 * (q[y - 1, x] + q[y + 1, x] + q[y, x - 1] + q[y, x + 1] - 4 * q[y, x])
            drag = 0.4 * np.hypot(east, north) * q[y, x] / depth[y, x]
            relaxed = sponge[y, x] * (outer[y, x] - q[y, x])
            expected = rotation + push[y, x] + relaxed + spread - advection - drag
            np.testing.assert_allclose(made[k][y, x], expected, atol=2e-6)


def test_a_step_is_of_the_third_order():
    """A current that turns under a push, far from coasts and without waves: the series of its exponential to dt^3."""
    parameters = Twin(eddies=4, f=0.02, friction=0.0, viscosity=0.0, divergence_damping=0.0)
    g, sea = twin.geometry(parameters), twin.sea(parameters)._replace(gravity=jnp.float32(0))

    def everywhere(one):
        return tuple(jnp.full(sea.ocean.shape, part, jnp.float32) for part in (one.real, one.imag))

    current, push, turn = 0.02 + 0.05j, 3e-4 - 2e-4j, -1j * parameters.f * parameters.dt
    start = still(sea)._replace(**dict(zip("uv", everywhere(current), strict=True)))
    after = run(parameters, sea, start, Forcing((start.u, start.v), everywhere(push)), 1)
    expected = current * (1 + turn + turn**2 / 2 + turn**3 / 6) + parameters.dt * push * (1 + turn / 2 + turn**2 / 6)
    far = ndimage.distance_transform_edt(g.ocean & (g.sponge == 0)) > 12
    assert far.sum() > 100
    u, v = (np.asarray(twin.unflatten(q))[far] for q in after[:2])
    np.testing.assert_allclose(u + 1j * v, expected, rtol=1e-5)


def test_a_closed_basin_keeps_its_volume():
    # Without a flow from outside the rim is a wall; only the sponge adds or takes water.
    sea = twin.sea(SMALL)
    sea = sea._replace(sponge=(0 * sea.sponge[0], 0 * sea.sponge[1]), sponge_cells=0 * sea.sponge_cells, open=sea.free)
    ocean = twin.geometry(SMALL).ocean
    y, x = np.mgrid[:Y, :X]
    eta = 0.2 * np.exp(-((y - 25) ** 2 + (x - 80) ** 2) / 60) * ocean
    start = still(sea)._replace(eta=jnp.asarray(twin.flatten(eta)))
    after = run(SMALL, sea, start, forced(start.u, start.v), 40)
    end = np.asarray(twin.unflatten(after.eta), np.float64)
    assert np.abs(end - eta).sum() > eta.sum() / 2
    assert abs(end.sum() - eta.sum()) < 1e-5 * eta.sum()


def test_through_flows_are_free_of_divergence_and_curl_and_about_one_metre_a_second():
    g = twin.geometry(SMALL)
    outflow = divergence(g.depth_u * g.modes_u, g.depth_v * g.modes_v)
    pieces, count = ndimage.label(~g.ocean)
    island = ~g.ocean & (pieces != pieces[-1, 0])
    near = ndimage.binary_dilation(island)
    transport = np.abs(g.depth_u * g.modes_u).max((1, 2))
    assert count > 1
    assert (np.abs(outflow[:, g.ocean & ~near]).max(-1) < 1e-9 * transport).all()
    # Islands are shallow to a mode, so some would flow through them; that part is cut off.
    assert (np.abs(outflow[:, g.ocean & near]).max(-1) < 0.1 * transport).all()
    curl = np.diff(g.modes_v[:, 1:-1], axis=-1) - np.diff(g.modes_u[:, :, 1:-1], axis=-2)
    open_water = ~ndimage.maximum_filter(~g.ocean, 2)[1:, 1:]
    assert np.abs(curl[:, open_water]).max() < 1e-9
    speed = np.hypot((g.modes_u[..., 1:] + g.modes_u[..., :-1]) / 2, (g.modes_v[:, 1:] + g.modes_v[:, :-1]) / 2)
    np.testing.assert_allclose(np.median(speed[:, g.ocean], axis=-1), 1)
    across = (g.depth_u * g.modes_u).sum(1)  # the transport through every meridian
    np.testing.assert_allclose(across[0], across[0, 0], rtol=0.01)


def test_a_longer_forcing_begins_with_the_shorter_one():
    short, long = twin.through_flow(SMALL, 50), twin.through_flow(SMALL, 400)
    np.testing.assert_array_equal(short, long[:50])
    other = twin.through_flow(Twin(seed=1), 50)
    assert (np.abs(other - short).mean(0) > 0.001).all()


# Hours (Schureman 1958, table 2; Pugh, "Tides, Surges and Mean Sea-Level", 1987, table 4.1).
PERIODS = {"M2": 12.4206, "S2": 12.0, "N2": 12.6583, "K1": 23.9345, "O1": 25.8193}


@pytest.mark.parametrize("name", PERIODS)
def test_a_tide_has_its_period_and_is_highest_at_its_phase(name):
    calm = {"mean": (0.0,) * 3, "season": (0.0,) * 3, "slow": (0.0,) * 3, "fast": (0.0,) * 3}
    parameters = Twin(tides=((name, (0.1, 0.2, -0.3), (0, 30, 90)),), **calm)
    t = np.arange(-twin.SPIN_UP, 2000 - twin.SPIN_UP)
    late = np.array([0, 30, 90]) / 360 * PERIODS[name]
    expected = np.array([0.1, 0.2, -0.3]) * np.cos(2 * np.pi * (t[:, None] - late) / PERIODS[name])
    np.testing.assert_allclose(twin.through_flow(parameters, 2000), expected, atol=3e-3)


def test_the_season_comes_back_after_a_year():
    calm = {"slow": (0.0,) * 3, "fast": (0.0,) * 3, "tides": ()}
    a = twin.through_flow(Twin(mean=(0.1, 0.2, 0.3), season=(0.05, 0.0, -0.02), **calm), twin.SPIN_UP + 8767)
    first, half, year = a[twin.SPIN_UP], a[twin.SPIN_UP + 4383], a[twin.SPIN_UP + 8766]
    np.testing.assert_allclose(first, (0.15, 0.2, 0.28), rtol=1e-6)
    np.testing.assert_allclose(half, (0.05, 0.2, 0.32), rtol=1e-6)
    np.testing.assert_allclose(year, first, rtol=1e-6)


def test_weather_has_the_deviation_and_the_memory_that_are_asked_for():
    quiet = {"mean": (0.0,) * 3, "season": (0.0,) * 3, "tides": ()}
    for k, name, hours, smooth in ((0, "slow", 60, 4), (2, "fast", 5, 1)):
        others = dict.fromkeys(("slow", "fast"), (0.0,) * 3)
        deviation = np.array([0.1, 0.2, 0.3])
        a = twin.through_flow(Twin(**(quiet | others | {name: tuple(deviation)})), 60_000)
        memory = np.exp(-1 / hours)
        # Of the mean over `smooth` hours, whose correlations are sums of those of the hours themselves.
        lags = np.abs(np.subtract.outer(np.arange(smooth), np.arange(smooth)))
        variance, later = (np.mean(memory ** np.abs(lags + shift)) for shift in (0, 24))
        np.testing.assert_allclose(a.std(0), deviation * np.sqrt(variance), rtol=0.05)
        found = np.mean(a[24:] * a[:-24], 0) / np.mean(a**2, 0)
        np.testing.assert_allclose(found[k], later / variance, atol=0.04)


def test_eddies_have_the_speed_that_is_asked_for_and_no_divergence():
    parameters = Twin(eddies=24, eddy_speed=0.3)
    g = twin.geometry(parameters)
    made = twin.eddies(parameters, 0, 264)
    assert np.sqrt(np.mean(np.sum(made.strength**2, 1))) == pytest.approx(0.3, rel=0.1)
    each = np.mean(made.strength[1:] * made.strength[:-1], 0).sum() / np.mean(made.strength**2, 0).sum()
    assert each == pytest.approx(np.exp(-1 / 2.5), abs=0.05)
    u, v = (jax.vmap(lambda q, f=faces: twin.unflatten(q, f))(q) for q, faces in zip(made[:2], FACES, strict=True))
    # A wall that lies beside a cell stops part of what would go through it.
    inside = ndimage.binary_erosion(g.ocean, border_value=1)
    assert np.abs(divergence(np.asarray(u, float), np.asarray(v, float))[:, inside]).max() < 1e-5
    speed = np.mean(np.asarray(u) ** 2, (1, 2)) + np.mean(np.asarray(v) ** 2, (1, 2))
    assert (speed > 0.6).all()
    assert (speed <= 1).all()


def test_a_sea_without_forces_follows_its_through_flow(monkeypatch):
    """Where a step does nothing but take accelerations and what is prescribed, an hour adds up to its ends."""

    def add(parameters, sea, now, forcing):
        u = now.u + parameters.dt * forcing.push[0]
        return State(u, now.v + parameters.dt / 3600 * forcing.external[1], now.eta)

    monkeypatch.setattr(twin, "step", add)
    parameters = Twin(eddies=4, stir=0.0, seed=3)
    g, hours = twin.geometry(parameters), 5
    a = twin.through_flow(parameters, hours)
    modes = [twin.flatten(part, "edge") for part in (g.modes_u, g.modes_v)]
    swirl = twin.eddies(parameters, 0, hours)
    made = np.asarray(twin._simulate(parameters, twin.sea(parameters), tuple(modes), np.float32(a), swirl))
    south, north, west, east = twin.PAD
    inner = np.s_[south : Y - north, west : X - east]
    change = np.tensordot(a[1:] - a[0], g.modes_u, 1)
    np.testing.assert_allclose(made[..., 0], ((change[..., 1:] + change[..., :-1]) / 2)[:, *inner], atol=1e-5)
    outside = np.tensordot(a, g.modes_v, 1)
    outside = outside + [twin.unflatten(q, FACES[1]) for q in swirl.strength @ swirl.v]
    mean = np.cumsum((outside[1:] + outside[:-1]) / 2, 0)
    np.testing.assert_allclose(made[..., 1], ((mean[:, 1:] + mean[:, :-1]) / 2)[:, *inner], atol=1e-5)


def test_windows_and_seeds_differ_in_their_eddies():
    first, again, second, other = (
        twin.eddies(parameters, window, 30)
        for parameters, window in ((SMALL, 0), (SMALL, 0), (SMALL, 1), (Twin(seed=1, eddies=4), 0))
    )
    for same, new, seed in zip(first, second, other, strict=False):
        assert abs(np.corrcoef(same.ravel(), new.ravel())[0, 1]) < 0.5
        assert abs(np.corrcoef(same.ravel(), seed.ravel())[0, 1]) < 0.5
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.fixture(scope="module")
def six_hours():
    return twin.simulate(SMALL, 0, 6)


def test_simulation_is_deterministic_and_has_values_in_the_ocean_alone(six_hours):
    ocean = twin.grid()[0]
    assert six_hours.shape == (6, 44, 94, 2)
    assert six_hours.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(six_hours), np.broadcast_to(~ocean[None, ..., None], six_hours.shape))
    np.testing.assert_array_equal(six_hours, twin.simulate(SMALL, 0, 6))


def test_frames_are_made_on_the_host_beside_any_accelerator(monkeypatch):
    """Its rounding would grow into other eddies, in frames that models and sweeps take for the same."""

    def simulate(*_):
        raise InputError(f"made on {jax.config.jax_default_device}")

    monkeypatch.setattr(twin, "_simulate", simulate)
    with pytest.raises(InputError, match=f"made on {jax.local_devices(backend='cpu')[0]}"):
        twin.simulate(SMALL, 0, 2)


def test_a_longer_simulation_begins_with_the_shorter_one(six_hours):
    np.testing.assert_allclose(twin.simulate(SMALL, 0, 8)[:6], six_hours, atol=1e-5)


def test_generate_names_place_and_time(six_hours):
    fields = twin.generate(6, SMALL, cache=False, progress=False)
    ocean, lat, lon = twin.grid()
    np.testing.assert_array_equal(fields.velocity[:, ocean], six_hours[:, ocean])
    np.testing.assert_array_equal(fields.ocean, ocean)
    np.testing.assert_array_equal((fields.lat, fields.lon[:44]), (lat, lon[:44]))
    assert fields.time[0] == np.datetime64("2020-01-01T00")
    assert fields.step == np.timedelta64(1, "h")


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Windows asked of a stand-in for `simulate`, in a cache of their own; frame k of a series is filled with k."""
    seen = []

    def stand_in(_, window, hours):
        seen.append((window, hours))
        frame = twin.WINDOW * window + np.arange(hours, dtype=np.float32)
        velocity = np.full((hours, 44, 94, 2), np.nan, np.float32)
        velocity[:, twin.grid()[0]] = frame[:, None, None]
        return velocity

    monkeypatch.setattr(twin, "simulate", stand_in)
    monkeypatch.setenv("JAX_REPAINT_CACHE", str(tmp_path))
    return seen


def frames(count, parameters=SMALL, **options):
    velocity = twin.generate(count, parameters, progress=False, **options).velocity
    ocean = twin.grid()[0]
    assert velocity.shape == (count, 44, 94, 2)
    np.testing.assert_array_equal(velocity[:, ocean].mean((1, 2)), np.arange(count))


def test_windows_are_cached(calls, tmp_path):
    frames(3)
    files = list(tmp_path.rglob("*"))
    assert [f.name for f in files if f.is_file()] == ["0000.npy"]
    frames(3)
    frames(2)
    assert calls == [(0, 3)]
    frames(5)
    frames(5)
    assert calls == [(0, 3), (0, 5)]
    frames(4, Twin(seed=1))
    frames(4, SMALL, cache=False)
    assert calls[2:] == [(0, 4), (0, 4)]


def test_a_cache_that_fails_costs_only_time(calls, tmp_path, monkeypatch, caplog):
    frames(3)
    (path,) = tmp_path.rglob("*.npy")
    for content in (path.read_bytes()[:1000], b""):
        path.write_bytes(content)
        frames(3)
        assert "0000.npy cannot be read; its window is simulated again" in caplog.text
        caplog.clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_REPAINT_CACHE", str(tmp_path / "file"))
    frames(twin.WINDOW + 1)
    assert caplog.text.count("simulated windows are not kept, JAX_REPAINT_CACHE names another folder") == 1
    assert calls[1:3] == [(0, 3), (0, 3)]
    # Threads simulate windows, in any order.
    assert sorted(calls[3:]) == [(0, twin.WINDOW), (1, 1)]


def test_windows_come_in_order_and_the_last_is_cut(calls):
    frames(2 * twin.WINDOW + 3)
    assert sorted(calls) == [(0, twin.WINDOW), (1, twin.WINDOW), (2, 3)]
    frames(2 * twin.WINDOW - 1)
    assert len(calls) == 3


def test_a_series_may_begin_later(calls):
    first, count = 2 * twin.WINDOW - 2, twin.WINDOW + 3
    later = twin.generate(count, progress=False, first=first)
    assert sorted(calls) == [(1, twin.WINDOW), (2, twin.WINDOW), (3, 1)]
    whole = twin.generate(first + count, progress=False)
    np.testing.assert_array_equal(later.velocity, whole.velocity[first:])
    np.testing.assert_array_equal(later.time, whole.time[first:])


def test_what_takes_minutes_is_announced_once(calls, tmp_path, caplog):
    hours = 3 * twin.WINDOW
    with caplog.at_level("INFO"):
        frames(twin.WINDOW)
        assert not caplog.messages
        frames(hours)
        frames(hours)
        twin.select(np.arange(0, hours, 7), SMALL)
        kept = tmp_path / "twin" / SMALL.key()
        assert caplog.messages == [f"simulating {2 * twin.WINDOW} hours of the twin, which are kept in {kept}"]
        # Up to these frames of three windows, and to those of one.
        twin.select(np.array([99, 2 * twin.WINDOW - 1, 2 * twin.WINDOW]), SMALL, cache=False)
        twin.select(np.array([twin.WINDOW - 1]), SMALL, cache=False)
    assert caplog.messages[1:] == [f"simulating {100 + twin.WINDOW + 1} hours of the twin"]


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="at least one frame"):
        twin.generate(0)
    with pytest.raises(InputError, match="first frame of a twin has number 0, got -1"):
        twin.generate(1, first=-1)
    with pytest.raises(InputError, match="unstable"):
        twin.simulate(Twin(dt=120.0, eddies=4), 0, 1)
    for hours in (0, twin.WINDOW + 1):
        with pytest.raises(InputError, match="1 to 240 hours"):
            twin.simulate(SMALL, 0, hours)


@pytest.mark.slow
def test_statistics_of_a_sample_are_those_of_the_real_place():
    """As they are published: u -0.0693 +- 0.1358, v -0.0324 +- 0.0890 m/s, speed 0.1447, div / curl 0.44.

    Ten windows of two days are ten draws of a weather that decorrelates in 60 h, hence the wide bounds of the means.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        velocity = np.concatenate(list(pool.map(lambda window: twin.simulate(Twin(), window, 48), range(0, 70, 7))))
    ocean = twin.grid()[0]
    sea = velocity[:, ocean].astype(np.float64)
    np.testing.assert_allclose(sea.mean((0, 1)), (-0.0693, -0.0324), rtol=0.35)
    np.testing.assert_allclose(sea.std((0, 1)), (0.1358, 0.0890), rtol=0.2)
    np.testing.assert_allclose(np.hypot(sea[..., 0], sea[..., 1]).mean(), 0.1447, rtol=0.2)
    spread, curl, inside = divergence_vorticity(velocity, ocean, 50.0, 50.0)
    ratio = np.sqrt(np.mean(spread[:, inside] ** 2) / np.mean(curl[:, inside] ** 2))
    np.testing.assert_allclose(ratio, 0.44, rtol=0.2)
