import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint.data import fields as data
from jax_repaint.data import plane
from jax_repaint.data.fields import Fields, Standardiser
from jax_repaint.errors import InputError

HOUR = np.timedelta64(1, "h")
START = np.datetime64("2020-01-01T00", "ns")


def hours(count):
    return START + np.arange(count) * HOUR


def make(velocity, time=None, **other):
    """Fields on a grid of 0.1 degrees near the equator, hourly."""
    velocity = np.asarray(velocity)
    y, x = velocity.shape[1:3]
    place = {"lat": 0.1 * np.arange(y), "lon": 10 + 0.1 * np.arange(x)} | other
    return Fields.create(velocity, time=hours(len(velocity)) if time is None else time, **place)


def noise(frames=6, y=3, x=4, seed=0):
    return np.random.default_rng(seed).normal(0, 0.2, (frames, y, x, 2)).astype(np.float32)


def red_noise(coefficients, frames, cells=4, seed=0):
    """Autoregressive series (frames, 2, cells / 2, 2) and the law of their autocorrelation, by Yule and Walker."""
    rng = np.random.default_rng(seed)
    order = len(coefficients)
    x = np.zeros((frames + 500, 2 * cells))
    for t in range(order, len(x)):
        x[t] = sum(c * x[t - 1 - k] for k, c in enumerate(coefficients)) + rng.normal(size=2 * cells)
    law = [1.0] if order == 1 else [1.0, coefficients[0] / (1 - coefficients[1])]
    for _ in range(frames // 4):
        law.append(sum(c * law[-1 - k] for k, c in enumerate(coefficients)))
    return x[500:].reshape(frames, 2, cells // 2, 2), np.array(law)


class TestCreate:
    def test_ocean_is_where_values_ever_are_and_halves_count_as_missing(self):
        velocity = noise()
        velocity[:, 0, 0] = np.nan  # land
        velocity[2, 1, 1] = np.nan  # a gap
        velocity[3, 2, 2, 0] = np.nan  # one component only
        given = velocity.copy()
        fields = make(velocity)
        expected = np.ones((3, 4), bool)
        expected[0, 0] = False
        np.testing.assert_array_equal(fields.ocean, expected)
        assert np.isnan(fields.velocity[3, 2, 2]).all()
        assert fields.gaps == pytest.approx(2 / (6 * 11))
        np.testing.assert_array_equal(velocity, given)

    def test_land_of_a_given_mask_holds_no_value(self):
        ocean = np.ones((3, 4), bool)
        ocean[1, 2] = False
        fields = make(noise(), ocean=ocean)
        assert np.isnan(fields.velocity[:, 1, 2]).all()
        assert fields.gaps == 0
        np.testing.assert_array_equal(fields.u[:, ocean], noise()[:, ocean, 0])
        np.testing.assert_array_equal(fields.v[:, ocean], noise()[:, ocean, 1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"velocity": noise()[..., :1]}, r"velocity must be \(time, y, x, 2\)"),
            ({"velocity": noise()[0]}, r"velocity must be \(time, y, x, 2\)"),
            ({"lat": np.arange(4.0)}, r"do not fit a grid of \(3, 4\)"),
            ({"lat": np.zeros((3, 4))}, r"do not fit a grid of \(3, 4\)"),
            ({"time": hours(5)}, "5 times for 6 frames"),
            ({"lat": np.array([0.2, 0.1, 0.0])}, "latitude must increase"),
            ({"lon": np.array([0.0, 1.0, 1.0, 2.0])}, "longitude must increase"),
            ({"lat": np.array([0.0, np.nan, 1.0])}, "latitude or longitude is missing"),
            ({"lat": np.array([0.0, 50.0, 100.0])}, "latitude 100.0 is beyond the pole"),
            ({"time": hours(6)[::-1]}, r"time must increase, but frame 1 \(2020-01-01T04:00:00\)"),
            ({"time": START + np.array([0, 1, 1, 2, 3, 4]) * HOUR}, "frame 2 .* does not follow frame 1"),
            (
                {"time": np.where(np.arange(6) == 3, np.datetime64("NaT"), hours(6))},
                "time of frame 3 is missing",
            ),
            ({"time": np.arange(6.0)}, "time must hold dates"),
            ({"time": np.datetime64("3000-01-01", "D") + np.arange(6)}, "not all in the years 1678"),
            ({"velocity": np.full((6, 3, 4, 2), np.nan)}, "no ocean cell"),
            ({"ocean": np.zeros((3, 4), bool)}, "no ocean cell"),
            ({"ocean": np.ones((4, 3), bool)}, r"ocean is \(4, 3\) but the grid is \(3, 4\)"),
            ({"velocity": np.ones((6, 3, 4, 2))}, "u is 1.0 m/s everywhere"),
            ({"velocity": noise() * [1, 0]}, "v is 0.0 m/s everywhere"),
            (
                {"velocity": np.where(np.arange(6)[:, None, None, None] == 4, np.inf, noise())},
                "frame 4 .* infinite",
            ),
            ({"velocity": noise()[:, :1], "lat": np.zeros(1)}, "too small"),
        ],
    )
    def test_what_cannot_be_used_is_refused_in_one_sentence(self, change, message):
        good = {"velocity": noise(), "lat": np.arange(3.0), "lon": np.arange(4.0), "time": hours(6)}
        with pytest.raises(InputError, match=message) as caught:
            Fields.create(**good | change)
        assert "\n" not in str(caught.value)

    def test_empty_frames_are_named(self):
        velocity = noise(9)
        velocity[[1, 7]] = np.nan
        with pytest.raises(InputError, match=r"no value in frame 1 \(2020-01-01T01:00:00\), 7 \(2020-01-01T07"):
            make(velocity)


class TestGrid:
    @pytest.mark.parametrize("shift", [0.0, 160.5])
    def test_distances_are_those_on_the_sphere(self, shift):
        lat, lon = np.linspace(-40, -38, 5), (np.linspace(18, 21, 7) + shift + 180) % 360 - 180
        lon = np.unwrap(lon, period=360)
        place = make(noise(2, 5, 7), lat=lat, lon=lon).metres().reshape(-1, 2)
        phi, lam = (a.ravel() for a in np.meshgrid(np.radians(lat), np.radians(lon), indexing="ij"))
        half = np.sin((phi[:, None] - phi) / 2) ** 2
        half += np.cos(phi[:, None]) * np.cos(phi) * np.sin((lam[:, None] - lam) / 2) ** 2
        sphere = 2 * 6371008.8 * np.arcsin(np.sqrt(half))
        on_plane = np.linalg.norm(place[:, None] - place, axis=-1)
        np.testing.assert_allclose(on_plane, sphere, rtol=4e-4, atol=0.1)
        np.testing.assert_allclose(place.reshape(5, 7, 2)[2, 3], 0, atol=1e-6)
        assert (np.diff(place.reshape(5, 7, 2)[..., 0], axis=0) > 0).all()
        assert (np.diff(place.reshape(5, 7, 2)[..., 1], axis=1) > 0).all()

    def test_the_ram_head_grid_has_cells_of_fifty_metres(self):
        with np.load(data.__file__.replace("fields.py", "ramhead_grid.npz")) as grid:
            fields = make(noise(2, 44, 94), lat=grid["lat"], lon=grid["lon"])
        np.testing.assert_allclose(fields.spacing, 50.7, atol=0.3)

    @pytest.mark.parametrize("round_pole", [False, True])
    def test_positions_do_not_tear_where_a_domain_is_wide(self, round_pole):
        """Half way round the earth and more: neighbours are as far apart as on the sphere, or little more."""
        if round_pole:
            y, x = np.meshgrid(*[100.0 * (np.arange(31) - 15)] * 2, indexing="ij")
            lat, lon = 90 - np.degrees(np.hypot(x, y) / 6371.0088), np.degrees(np.arctan2(x, -y))
            fields = make(noise(2, 31, 31), lat=lat, lon=lon)
            np.testing.assert_allclose(np.diff(fields.metres()[..., 0], axis=0), 1e5, rtol=1e-6)
            np.testing.assert_allclose(np.diff(fields.metres()[..., 1], axis=1), 1e5, rtol=1e-6)
        else:
            fields = make(noise(2, 41, 96), lat=np.arange(-20, 21.0), lon=np.arange(100, 292.0, 2))
            steps = np.diff(fields.metres()[20, :, 1])
            np.testing.assert_allclose(steps, np.radians(2) * 6371008.8, rtol=1e-6)
        np.testing.assert_allclose(fields.spacing[0], 1e5 if round_pole else np.radians(1) * 6371008.8, rtol=0.02)

    @pytest.mark.parametrize("middle", [(62, 10), (75, 179), (-35, 25), (-90, 0)])
    def test_east_and_north_are_turned_on_the_plane_as_a_drifter_shows(self, middle):
        """Cells that are a metre apart to the east and north of each other, on one plane."""
        lat0, lon0 = middle
        y, x = np.meshgrid(np.arange(-6, 7), np.arange(-8, 9), indexing="ij")
        lat = np.clip(lat0 + y, -89.5, 90) if lat0 > -90 else -90 + np.hypot(x, y) + 0.3
        lon = lon0 + 2.0 * x if lat0 > -90 else np.degrees(np.arctan2(y + 0.1, x + 0.2))
        metre = np.degrees(1 / 6371008.8)
        north = plane.metres(np.concatenate([lat, lat + metre]), np.concatenate([lon, lon]))
        east = plane.metres(np.concatenate([lat, lat]), np.concatenate([lon, lon + metre / np.cos(np.radians(lat))]))
        drift = [place[len(lat) :] - place[: len(lat)] for place in (east, north)]
        # A plane stretches across the line from its centre: the two are square but for that.
        seen = np.angle((drift[0] @ [1j, 1]) + (drift[1] @ [1j, 1]) / 1j)
        off = np.angle(np.exp(1j * (plane.convergence(lat, lon) - seen)))
        np.testing.assert_allclose(off, 0, atol=1e-3)
        assert np.abs(seen).max() > 0.1

    def test_places_are_counted_in_neighbours_to_the_north(self):
        """Of cells that are twice as long as wide; fitted kernels have their lengths in this unit."""
        places = make(noise(), lon=10 + 0.2 * np.arange(4)).places()
        np.testing.assert_allclose(np.diff(places[..., 0], axis=0), 1, rtol=1e-4)
        np.testing.assert_allclose(np.diff(places[..., 1], axis=1), 2, rtol=1e-4)

    def test_two_dimensional_coordinates_give_the_same_metres(self):
        regular = make(noise())
        lat, lon = np.meshgrid(regular.lat, regular.lon, indexing="ij")
        np.testing.assert_array_equal(make(noise(), lat=lat, lon=lon).metres(), regular.metres())

    def test_the_hash_sees_every_part_of_the_content_and_not_the_name(self):
        velocity = noise()
        velocity[:, 0, 0] = np.nan
        fields = make(velocity)
        assert make(velocity, name="other").hash() == fields.hash()
        changed = velocity.copy()
        changed[5, 2, 3, 1] = np.nextafter(changed[5, 2, 3, 1], np.float32(1))
        ocean = fields.ocean.copy()
        ocean[0, 0] = True
        others = [
            make(changed),
            make(velocity, lat=fields.lat + 1e-9),
            make(velocity, lon=fields.lon + 1e-9),
            make(velocity, time=fields.time + np.timedelta64(1, "ns")),
            make(velocity, ocean=ocean),
            fields.select(slice(0, 5)),
        ]
        assert len({fields.hash(), *(other.hash() for other in others)}) == 7

    def test_selected_frames_keep_grid_and_ocean(self):
        velocity = noise()
        velocity[:3, 0, 0] = np.nan
        fields = make(velocity)
        part = fields.select(np.array([0, 2]))
        np.testing.assert_array_equal(part.velocity, velocity[[0, 2]])
        np.testing.assert_array_equal(part.time, hours(6)[[0, 2]])
        np.testing.assert_array_equal(part.ocean, fields.ocean)

    def test_cells_with_gaps_can_be_made_land(self):
        velocity = noise()
        velocity[:2, 0, 0] = np.nan
        fields = make(velocity)
        assert not fields.covered().ocean[0, 0]
        assert fields.covered().gaps == 0
        assert fields.covered(4 / 6).ocean[0, 0]

    def test_frames_that_had_values_on_such_cells_alone_are_left_out(self, caplog):
        velocity = noise()
        velocity[:3, 0, 0] = velocity[3] = np.nan
        velocity[3, 0, 0] = 0.1
        covered = make(velocity).covered(0.7)
        np.testing.assert_array_equal(covered.velocity[:, 1:], np.delete(velocity, 3, 0)[:, 1:])
        assert "1 of 6 frames keep no value" in caplog.text

    def test_what_a_masked_array_hides_is_missing(self):
        velocity = noise()
        hidden = velocity > 0.2
        assert hidden.any()
        place = {"lat": np.arange(3.0), "lon": np.arange(4.0), "time": hours(6)}
        fields = Fields.create(np.ma.masked_array(velocity, hidden), **place)
        np.testing.assert_array_equal(fields.present, ~hidden.any(-1))


class TestDecorrelation:
    def test_autocorrelation_is_the_plain_double_sum_with_gaps_and_missing_frames(self):
        """Of more cells than are taken at once."""
        rng = np.random.default_rng(3)
        velocity = rng.normal(size=(40, 3, 30, 2)).cumsum(0).astype(np.float32)
        velocity[:, 0, 0] = np.nan
        velocity[rng.random(velocity.shape[:3]) < 0.1] = np.nan
        time = np.delete(hours(41), 17)
        fields = make(velocity, time, lat=np.array([0.0, 30.0, 60.0]))
        regular = np.full((41, *velocity.shape[1:]), np.nan)
        regular[np.delete(np.arange(41), 17)] = velocity
        weight = np.cos(np.radians(fields.lat))[:, None, None]
        total = []
        for lag in range(11):
            summed = counted = 0.0
            for y, x in np.argwhere(fields.ocean):
                for c in range(2):
                    series = regular[:, y, x, c] - np.nanmean(regular[:, y, x, c])
                    product = series[: 41 - lag] * series[lag:]
                    summed += weight[y, 0, 0] * np.nansum(product)
                    counted += weight[y, 0, 0] * np.isfinite(product).sum()
            total.append(summed / counted)
        np.testing.assert_allclose(data.autocorrelation(fields), np.array(total) / total[0], rtol=1e-9, atol=1e-12)

    def test_exponential_memory_is_found(self):
        velocity, _ = red_noise([math.exp(-1 / 8)], 20_000)
        assert data.decorrelation_time(make(velocity)) == pytest.approx(8, rel=0.12)

    def test_the_last_strong_recurrence_counts_and_not_the_first_crossing(self):
        damping, period = math.exp(-1 / 30), 12
        velocity, law = red_noise([2 * damping * math.cos(2 * math.pi / period), -(damping**2)], 20_000)
        expected = np.flatnonzero(np.abs(law) >= math.exp(-1))[-1]
        assert expected > 20
        assert np.flatnonzero(law < math.exp(-1))[0] == 3
        measured = data.decorrelation_time(make(velocity))
        # Recurrences come every half period; the sampled one may fall on the neighbouring side of the threshold.
        assert measured == pytest.approx(expected, abs=7)

    def test_fields_that_turn_round_are_alike(self):
        """Half a period of 12 frames later r is -0.55, and 0.3 after a whole one."""
        damping = 0.55 ** (1 / 6)
        velocity, law = red_noise([2 * damping * math.cos(2 * math.pi / 12), -(damping**2)], 4_000)
        expected = np.flatnonzero(np.abs(law) >= math.exp(-1))[-1]
        assert law[expected] < 0
        assert data.decorrelation_time(make(velocity)) == pytest.approx(expected + 0.5, abs=1)

    def test_an_undamped_tide_lasts_to_the_longest_lag_and_a_weak_one_not(self):
        red, _ = red_noise([math.exp(-1 / 5)], 4_000)
        red /= red.std()
        tide = np.sqrt(2) * np.cos(2 * np.pi * np.arange(4_000) / 12)[:, None, None, None]
        strong, weak = (make(np.sqrt(1 - share) * red + np.sqrt(share) * tide) for share in (0.5, 0.2))
        assert data.decorrelation_time(strong) > 990
        # r = 0.8 exp(-l / 5) + 0.2 cos(2 pi l / 12) is 0.439 at lag 3, 0.259 at lag 4 and never above 1/e again.
        assert data.decorrelation_time(weak) == pytest.approx(3 + (0.439 - math.exp(-1)) / 0.18, abs=0.15)

    @pytest.mark.parametrize("campaigns", [2, 5])
    def test_a_few_pairs_at_the_ends_of_campaigns_do_not_decide(self, campaigns):
        """Of thirty days a year, whose longest lags lie in the first quarter of the whole record."""
        parts = [red_noise([math.exp(-1 / 20)], 720, seed=seed)[0] for seed in range(campaigns)]
        time = np.concatenate([hours(720) + year * 8766 * HOUR for year in range(campaigns)])
        fields = make(np.concatenate(parts), time)
        assert data.decorrelation_time(fields) == pytest.approx(20, rel=0.4)
        # Where frames are missing at random every lag has pairs enough.
        kept = np.sort(np.random.default_rng(0).choice(720, 250, replace=False))
        r = data.autocorrelation(make(parts[0][kept], hours(720)[kept]))
        assert (r != 0).all()

    def test_a_short_record_has_none(self):
        with pytest.raises(InputError, match="7 frames are too few"):
            data.decorrelation_time(make(noise(7)))

    def test_the_real_data_have_their_known_memory(self, shared):
        with np.load(shared / "data/real/globcurrent_agulhas_2002_daily.npz") as file:
            velocity = np.stack([file["u"], file["v"]], -1)
            time = np.datetime64("2002-01-01", "D") + np.arange(365)
            fields = make(velocity, time, lat=file["lat"], lon=file["lon"])
        r = data.autocorrelation(fields)
        np.testing.assert_allclose(r[[1, 20]], [0.93, 0.11], atol=0.01)
        assert r[12] > math.exp(-1) > r[13]
        assert 12 < data.decorrelation_time(fields) < 13


class TestSplit:
    @pytest.fixture
    def fields(self):
        velocity, _ = red_noise([math.exp(-1 / 5)], 400)
        return make(velocity)

    def test_fractions_share_what_two_gaps_leave(self, fields):
        parts = data.split(fields)
        gap = math.ceil(parts.decorrelation)
        assert parts.gap == gap
        assert parts.train[0] == 0
        assert parts.validation[0] - parts.train[-1] == parts.test[0] - parts.validation[-1] == gap + 1
        assert parts.test[-1] == 399
        usable = 400 - 2 * gap
        for part, share in ((parts.train, 0.7), (parts.validation, 0.15), (parts.test, 0.15)):
            assert abs(part.size - share * usable) <= 1
            np.testing.assert_array_equal(np.diff(part), 1)

    @pytest.mark.parametrize(("gap", "frames"), [(30, 30), ("30h", 30), ("1 day 6h", 30), ("30h30min", 31)])
    def test_a_wider_gap_may_be_asked_for(self, fields, gap, frames):
        assert data.split(fields, gap=gap).gap == frames

    def test_a_range_may_have_one_end(self, fields):
        parts = data.split(fields, "/2020-01-10", "264:312", "2020-01-15:")
        np.testing.assert_array_equal(parts.train, np.arange(240))
        np.testing.assert_array_equal(parts.test, np.arange(336, 400))

    def test_carving_takes_a_fifth_of_what_a_gap_leaves(self, fields):
        gap = math.ceil(data.decorrelation_time(fields))
        last = round(0.2 * (300 - gap))
        assert data.carve(fields, "0:300") == (f"0:{300 - last - gap}", f"{300 - last}:300")

    @pytest.mark.parametrize("gap", [None, "72h"])
    def test_gaps_last_as_long_where_frames_are_closer(self, gap):
        """Three-hourly frames, then hourly ones: the usual step is the longer one."""
        time = START + np.concatenate([3 * np.arange(1200), 3600 + np.arange(800)]) * HOUR
        fields = make(red_noise([math.exp(-1 / 5)], 2000)[0], time)
        parts = data.split(fields, gap=gap)
        least = 24 if gap else math.ceil(parts.decorrelation)
        for one, other in ((parts.train, parts.validation), (parts.validation, parts.test)):
            unused = (time[other[0]] - time[one[-1]]) / (3 * HOUR) - 1
            assert least <= unused < least + 1
            # The next frame would have been too near.
            assert time[other[0] - 1] - time[one[-1]] < (least + 1) * 3 * HOUR
        assert parts.test[-1] == 1999
        first, last = (range(*map(int, part.split(":"))) for part in data.carve(fields, "1000:2000"))
        assert time[last[0]] - time[first[-1]] >= (parts.decorrelation + 1) * 3 * HOUR

    @pytest.mark.parametrize("seed", range(4))
    def test_times_that_were_written_as_fractions_are_as_regular_as_others(self, seed):
        """A tide lasts to the longest lag, a hundred frames, as the gaps do but for a microsecond."""
        tide = np.stack([np.cos(2 * np.pi * np.arange(400) / 10), np.sin(2 * np.pi * np.arange(400) / 10)], -1)
        off = np.random.default_rng(seed).integers(-1000, 1000, 400) * np.timedelta64(1, "ns")
        parts = data.split(make(np.broadcast_to(tide[:, None, None], (400, 2, 2, 2)), hours(400) + off))
        assert parts.decorrelation == 100
        assert parts.validation[0] - parts.train[-1] == parts.test[0] - parts.validation[-1] == 101

    def test_ranges_of_frames_and_of_dates_name_the_same_frames(self, fields):
        frames = data.split(fields, "0:240", "264:312", "336:")
        dates = data.split(fields, "2020-01-01:2020-01-10", "2020-01-12/2020-01-13", "2020-01-15T00:2020-02")
        for part in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(frames, part), getattr(dates, part))
        np.testing.assert_array_equal(frames.train, np.arange(240))
        np.testing.assert_array_equal(frames.test, np.arange(336, 400))
        timed = data.split(fields, "2020-01-01T00:00/2020-01-09T12:00", "264:312", "336:400")
        np.testing.assert_array_equal(timed.train, np.arange(8 * 24 + 13))
        assert "240 training, 48 validation, 64 test frames; smallest gap 24" in frames.describe()

    def test_a_gap_shorter_than_the_memory_is_refused_unless_allowed(self, fields):
        with pytest.raises(InputError, match="gap between validation and test is 1 frames, shorter than the decorr"):
            data.split(fields, "0:240", "280:320", "321:400")
        with pytest.raises(InputError, match="shorter"):
            data.split(fields, gap=2)
        assert data.split(fields, gap=2, allow_short_gap=True).gap == 2

    def test_a_hole_in_the_record_counts_as_a_gap(self, fields):
        time = fields.time + np.where(np.arange(400) >= 200, 48, 0) * HOUR
        holed = make(fields.velocity, time)
        assert data.split(holed, "0:200", "200:280", "320:400").gap == 40

    @pytest.mark.parametrize(
        ("ranges", "message"),
        [
            (
                ("0:200", "190:250", "300:400"),
                r"train and validation overlap in 10 frames, the first is frame 190",
            ),
            (("0:200", "250:250", "300:400"), "validation range '250:250' holds no frame"),
            (
                ("0:200", "250:280", "2021-01-01:2021-02-01"),
                "test range .* holds no frame; .* 400 frames from 2020",
            ),
            (("0:200", "250:280", "summer"), "neither frames .* nor dates"),
            (("0:200", "250:280", "1600-01-01:2020-01-20"), "neither frames .* nor dates .* in 1678"),
            (("0:200", "250:280", "2020-01-12:9999-12-31"), "neither frames .* nor dates .* in 1678"),
            (("0:200", "250:280", "2020-01-15T00:00:2020-01-16"), "neither frames .* nor dates"),
            (("0:200", 0.1, 0.2), "not a mixture"),
            ((0.7, 0.2, 0.2), "add up to 1 at most"),
            ((0.7, 0.3, 0.0), "must be positive"),
        ],
    )
    def test_impossible_parts_are_refused(self, fields, ranges, message):
        with pytest.raises(InputError, match=message):
            data.split(fields, *ranges)

    @pytest.mark.parametrize(
        ("gap", "message"),
        [
            ("soon", "not a number of frames nor a duration"),
            ("36", "not a number of frames nor a duration"),
            ("", "not a number of frames nor a duration"),
            ("NaT", "not a number of frames nor a duration"),
            ("-3h", "must not be negative"),
            (-1, "gap must be a whole number, at least 0"),
            (2.7, "gap must be a whole number, at least 0"),
            (float("nan"), "gap must be a whole number, at least 0"),
            (float("inf"), "gap must be a whole number, at least 0"),
            (200, "leave none"),
        ],
    )
    def test_impossible_gaps_are_refused(self, fields, gap, message):
        with pytest.raises(InputError, match=message):
            data.split(fields, gap=gap)

    def test_a_gap_beside_ranges_is_refused(self, fields):
        with pytest.raises(InputError, match="a gap goes with fractions"):
            data.split(fields, "0:200", "250:280", "320:400", gap=20)

    def test_the_block_split_is_the_known_one_and_warns_of_its_gaps(self, fields):
        with pytest.warns(UserWarning, match="gaps of 10 h"):
            parts = data.block_split(fields)
        pattern = ["train"] * 70 + [None] * 10 + ["validation"] * 15 + [None] * 10 + ["test"] * 15 + [None] * 10
        for name in ("train", "validation", "test"):
            expected = [t for t in range(400) if pattern[t % 130] == name]
            np.testing.assert_array_equal(getattr(parts, name), expected)
        assert parts.gap == 10

    def test_the_block_split_warns_in_hours_whatever_the_step(self):
        fields = make(red_noise([math.exp(-1 / 5)], 400)[0], START + 3 * np.arange(400) * HOUR)
        with pytest.warns(UserWarning, match="decorrelate in") as warned:
            parts = data.block_split(fields)
        assert f"decorrelate in {3 * parts.decorrelation:.3g} h" in str(warned[-1].message)
        hour = 3 * np.arange(400) % 130
        for name, low, high in (("train", 0, 70), ("validation", 80, 95), ("test", 105, 120)):
            np.testing.assert_array_equal(getattr(parts, name), np.flatnonzero((low <= hour) & (hour < high)))

    def test_a_frame_with_just_a_tenth_of_its_values_is_kept(self):
        velocity = noise(300, 3, 10)
        velocity[:, 2] = np.nan  # land
        velocity[3, :, 1:] = np.nan
        velocity[4, :, 1:] = velocity[4, 0] = np.nan
        fields = make(velocity)
        parts = data.Split(np.arange(100), np.arange(120, 150), np.arange(200, 300))
        assert fields.coverage[3] == 0.1
        np.testing.assert_array_equal(data.well_covered(fields, parts).train, np.delete(np.arange(100), 4))

    def test_a_record_shorter_than_a_block_has_no_block_split(self):
        with pytest.raises(InputError, match="leaves no test frame"):
            data.block_split(make(noise(100)))


class TestStandardiser:
    @pytest.fixture
    def fields(self):
        velocity = noise(50) * [1.0, 0.5] + [-0.07, 0.03]
        velocity[:, 0, 0] = np.nan
        return make(velocity)

    def test_statistics_are_those_of_the_training_ocean(self, fields):
        train = np.arange(30)
        z = Standardiser.from_fields(fields, train)
        values = fields.velocity[:30].astype(float)[:, fields.ocean].reshape(-1, 2)
        np.testing.assert_allclose(z.mean, values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(z.std, values.std(0), rtol=1e-6)
        x = z.standardise(fields.velocity, fields.ocean)
        np.testing.assert_allclose(x[:30][:, fields.ocean].mean((0, 1)), 0, atol=1e-6)
        np.testing.assert_allclose(x[:30][:, fields.ocean].std((0, 1)), 1, atol=1e-6)

    def test_a_shared_scale_keeps_directions(self, fields):
        z = Standardiser.from_fields(fields, shared_scale=True)
        values = fields.velocity.astype(float)[:, fields.ocean].reshape(-1, 2)
        np.testing.assert_allclose(z.std, math.sqrt(values.var(0).mean()), rtol=1e-6)

    def test_restoring_gives_back_the_velocities_and_land_its_value(self, fields):
        z = Standardiser.create([-0.0693, -0.0324], [0.1358, 0.0890], [0.51, 0.364])
        x = z.standardise(fields.velocity, fields.ocean)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x[:, 0, 0], np.broadcast_to(np.float32([0.51, 0.364]), (50, 2)))
        np.testing.assert_allclose(z.restore(x)[:, fields.ocean], fields.velocity[:, fields.ocean], rtol=0, atol=1e-7)

    def test_the_padding_holds_what_land_holds(self, fields):
        """A network that was trained with land at 0 m/s sees 0 m/s in the padding too."""
        z = Standardiser.from_fields(fields)
        still = Standardiser.create(z.mean, z.std, -z.mean / z.std)
        y, x = fields.ocean.shape
        padded, ocean = data.prepare(fields, still, (y + 3, x + 2))
        np.testing.assert_allclose(still.restore(padded)[:, ~ocean], 0, atol=1e-6)
        inside = data.crop(padded, fields.ocean.shape)
        np.testing.assert_array_equal(inside, still.standardise(fields.velocity, fields.ocean))

    def test_gaps_hold_the_mean_and_not_what_land_holds(self, fields):
        still = Standardiser.create([0.1, -0.2], [0.2, 0.3], [-0.5, 2 / 3])
        velocity = fields.velocity.copy()
        velocity[3, 1, 1] = np.nan
        x, ocean, present = data.prepare_with_gaps(make(velocity), still, 4)
        assert not present[3, 1, 1]
        np.testing.assert_array_equal(x[3, 1, 1], 0)
        np.testing.assert_array_equal(x[:, ~ocean], np.broadcast_to(still.land_value, x[:, ~ocean].shape))

    def test_variances_scale_with_the_square(self, fields):
        z = Standardiser.from_fields(fields)
        x = noise(4000, seed=5)
        variance = z.restore(x.astype(float)).var(0)
        np.testing.assert_allclose(z.restore_variance(x.astype(float).var(0)), variance, rtol=1e-6)

    def test_it_works_inside_a_compiled_function(self, fields):
        z = Standardiser.from_fields(fields)
        there = jax.jit(lambda v, ocean: z.standardise(v, ocean))(fields.velocity, jnp.asarray(fields.ocean))
        np.testing.assert_allclose(there, z.standardise(fields.velocity, fields.ocean), atol=1e-6)
        back = jax.jit(z.restore)(there)
        np.testing.assert_allclose(back[:, fields.ocean], fields.velocity[:, fields.ocean], atol=1e-6)
        points = jax.jit(z.standardise)(jnp.asarray(fields.velocity[0][fields.ocean]))
        np.testing.assert_allclose(points, there[0][fields.ocean], atol=1e-6)

    def test_gaps_stay_gaps(self, fields):
        velocity = fields.velocity.copy()
        velocity[3, 1, 1] = np.nan
        x = Standardiser.from_fields(fields).standardise(velocity, fields.ocean)
        assert np.isnan(x[3, 1, 1]).all()
        assert np.isnan(x).sum() == 2

    def test_json_keeps_every_digit(self, fields):
        z = Standardiser.from_fields(fields)
        again = Standardiser.from_json(json.loads(json.dumps(z.to_json())))
        for part in ("mean", "std", "land_value"):
            np.testing.assert_array_equal(getattr(again, part), getattr(z, part))

    def test_a_constant_component_is_refused(self, fields):
        velocity = fields.velocity.copy()
        velocity[:20, ..., 1] = 0.3
        with pytest.raises(InputError, match="v is constant on the training frames"):
            Standardiser.from_fields(make(velocity), np.arange(20))
        with pytest.raises(InputError, match="must be positive"):
            Standardiser.create([0, 0], [1, 0])

    @pytest.mark.parametrize("content", [{}, {"mean": [0, 0], "std": [1, 1]}, [1, 2], {"mean": "a", "std": 1}])
    def test_damaged_json_is_refused(self, content):
        with pytest.raises(InputError, match="a standardiser needs mean, std and land_value"):
            Standardiser.from_json(content)


class TestPad:
    def test_zeros_come_in_the_north_and_the_east_and_go_again(self):
        x = noise(2, 44, 94)
        padded = data.pad(x, 8)
        assert padded.shape == (2, 48, 96, 2)
        np.testing.assert_array_equal(padded[:, :44, :94], x)
        assert not padded[:, 44:].any()
        assert not padded[:, :, 94:].any()
        np.testing.assert_array_equal(data.crop(padded, (44, 94)), x)
        np.testing.assert_array_equal(jax.jit(lambda a: data.pad(a, 8))(x), padded)

    @pytest.mark.parametrize(
        ("multiple", "expected"), [(8, (48, 96)), ((64, 128), (64, 128)), (1, (44, 94)), ((11, 47), (44, 94))]
    )
    def test_padded_shapes(self, multiple, expected):
        assert data.padded_shape((44, 94), multiple) == expected

    def test_prepared_fields_are_zero_outside_the_ocean(self):
        velocity = noise(5)
        velocity[:, 2, 3] = np.nan
        fields = make(velocity)
        z = Standardiser.from_fields(fields)
        x, ocean = data.prepare(fields, z, 4)
        assert x.shape == (5, 4, 4, 2)
        assert x.dtype == np.float32
        assert ocean.sum() == 11
        assert not x[:, ~ocean].any()
        np.testing.assert_allclose(z.restore(x)[:, ocean], velocity[:, fields.ocean], rtol=0, atol=1e-7)

    def test_gaps_are_refused(self):
        velocity = noise(5)
        velocity[1, 2, 3] = np.nan
        fields = make(velocity)
        with pytest.raises(InputError, match=r"1.7 % of the values .* 4 of 5 frames are complete"):
            data.prepare(fields, Standardiser.from_fields(fields), 4)
