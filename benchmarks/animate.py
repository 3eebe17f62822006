"""Makes a short GIF of a trained agent from the film in its run folder (the trainers' --capture-video).

python benchmarks/animate.py runs/<run> --to benchmarks/figures/pong.gif --start 3 --seconds 12
python benchmarks/animate.py runs/<run> --to pong.gif --width 120 --colours 8          # smaller
"""

import argparse
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with video.mp4, or a film")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--start", type=float, default=2.0, help="seconds to skip at the film's beginning")
    parser.add_argument("--seconds", type=float, default=12.0, help="length in the film's time")
    parser.add_argument("--width", type=int, default=160, help="pixels; 160 is the emulator's own")
    parser.add_argument("--colours", type=int, default=16)
    parser.add_argument("--speed", type=float, default=1.0, help="times the film's own, up to 50 frames a second")
    options = parser.parse_args()
    if min(options.speed, options.width, options.seconds) <= 0 or not 1 <= options.colours <= 256 or options.start < 0:
        parser.error("--speed, --width and --seconds must be above 0, --start 0 or more, --colours from 1 to 256")
    if options.to.suffix.lower() != ".gif":
        parser.error(f"--to {options.to} must end in .gif")
    film = options.run / "video.mp4" if options.run.is_dir() else options.run
    if not film.exists():
        parser.error(f"{film} does not exist: train with --capture-video")
    try:
        fps = iio.immeta(film, plugin="FFMPEG")["fps"]
    except OSError:
        parser.error(f"{film} is no film that can be read")
    first = round(options.start * fps)
    frames = []
    for i, frame in enumerate(iio.imiter(film, plugin="FFMPEG")):
        if i >= first + options.seconds * fps:
            break
        if i >= first:
            height = round(frame.shape[0] * options.width / frame.shape[1])
            # Each pixel of the emulator is a block of the film: BOX takes the block's mean, which smooths the codec.
            frames.append(Image.fromarray(frame).resize((options.width, height), Image.Resampling.BOX))
    if not frames:
        parser.error(f"{film} ends before --start {options.start}")
    # One palette for all frames and no dithering: what does not move stays the same, and costs nothing. MAXCOVERAGE
    # gives paddles of a few pixels a colour of their own.
    sheet = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: max(1, len(frames) // 20)]]))
    palette = sheet.quantize(options.colours, Image.Quantize.MAXCOVERAGE)
    pictures = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options.to.parent.mkdir(parents=True, exist_ok=True)
    duration = 10 * max(2, round(100 / fps / options.speed))  # ms; GIF counts in hundredths, browsers from two on
    pictures[0].save(options.to, save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=True)
    print(f"{options.to}: {len(pictures)} frames, {options.to.stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    main()
