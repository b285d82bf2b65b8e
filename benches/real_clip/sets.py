"""Embeddings by real CLIP models, and how a set is divided into queries and a prompt bank."""

import dataclasses
import functools

import numpy as np

# The model that embedded each set: only sets of one model can lend each other a bank.
MODELS = {"coco500": "ViT-B/16", "imagenet4k": "ViT-B/32", "flickr8k": "ViT-B/32", "amazon997": "ViT-B/32"}
# Of the images of a catalogue, the share that is searched in `searched_part`.
SEARCHED_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class ClipSet:
    """Images and texts as unit vectors in f64, and which images answer which text."""

    name: str
    model: str
    images: np.ndarray
    texts: np.ndarray
    # Texts × images: whether the image answers the text.
    relevant: np.ndarray
    # The same texts in other words, if the set has them.
    other_wording: np.ndarray | None = None

    @functools.cached_property
    def targets(self):
        """First image that answers each text."""
        return self.relevant.argmax(axis=1)

    @functools.cached_property
    def distinct_targets(self):
        return np.unique(self.targets)


@dataclasses.dataclass(frozen=True)
class Task:
    """Queries that search a catalogue, and the texts of a prompt bank."""

    queries: np.ndarray
    images: np.ndarray
    # Queries × images.
    relevant: np.ndarray
    bank: np.ndarray
    # First image that answers each query: intervals draw queries with the same target together.
    targets: np.ndarray

    @functools.cached_property
    def scores(self):
        """Cosines, queries × images."""
        return self.queries @ self.images.T

    @functools.cached_property
    def first_images(self):
        """Plain CLIP's first image per query."""
        return self.scores.argmax(axis=1)

    @functools.cached_property
    def bank_scores(self):
        """Cosines, images × bank, ascending per image."""
        return np.sort(self.images @ self.bank.T, axis=1)

    def with_bank(self, bank):
        """Returns the same queries and images with another bank; what does not depend on it is shared."""
        task = dataclasses.replace(self, bank=bank)
        task.__dict__.update(scores=self.scores, first_images=self.first_images)
        return task


def normalise(vectors):
    """Returns unit vectors in f64."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def load(path):
    """Reads a set from its .npz file; a file that MODELS does not list has a model of its own."""
    with np.load(path) as arrays:
        images, texts = normalise(arrays["images"]), normalise(arrays["texts"])
        relevant = np.zeros((len(texts), len(images)), dtype=bool)
        relevant[tuple(arrays["relevant"].T)] = True
        other = normalise(arrays["texts_other_prompt"]) if "texts_other_prompt" in arrays else None
    return ClipSet(path.stem, MODELS.get(path.stem, path.stem), images, texts, relevant, other)


def halves(clip_set, seed):
    """Divides a set in two by target image, so that no image has a text on both sides; both directions.

    The images that answer the bank leave the catalogue. A text with several targets goes with the first.
    """
    first, second = parts(clip_set, seed, 2)
    return [divide(clip_set, first, second), divide(clip_set, second, first)]


def parts(clip_set, seed, count):
    """Returns the distinct targets in random order, in `count` parts."""
    return np.array_split(np.random.default_rng(seed).permutation(clip_set.distinct_targets), count)


def divide(clip_set, query_targets, bank_targets, removed_targets=()):
    """Returns the task of the texts of some targets, with the texts of others as bank.

    Images that answer the bank, or a text of `removed_targets`, are not in the catalogue.
    """
    queries, bank, removed = (
        np.flatnonzero(np.isin(clip_set.targets, targets)) for targets in (query_targets, bank_targets, removed_targets)
    )
    keep = ~clip_set.relevant[np.concatenate([bank, removed])].any(axis=0)
    return Task(
        queries=clip_set.texts[queries],
        images=clip_set.images[keep],
        relevant=clip_set.relevant[np.ix_(queries, keep)],
        bank=clip_set.texts[bank],
        targets=clip_set.targets[queries],
    )


def whole(clip_set, bank):
    """Returns the task of all texts of a set in all of its images, with a bank from elsewhere."""
    return Task(clip_set.texts, clip_set.images, clip_set.relevant, bank, clip_set.targets)


def searched_part(clip_set, seed, coverage):
    """Returns a task that searches only a tenth of the images, with a bank about these images alone.

    The bank describes the share `coverage` of the queries' images: by other texts of the same image if
    there are any, otherwise by the same texts in other words, otherwise by the queries themselves, as a
    query log does whose queries come again.
    """
    rng = np.random.default_rng(seed)
    targets = rng.permutation(clip_set.distinct_targets)
    images_per_target = clip_set.relevant.any(axis=0).sum() / len(targets)
    targets = targets[: round(SEARCHED_SHARE * len(clip_set.images) / images_per_target)]
    texts = rng.permutation(np.flatnonzero(np.isin(clip_set.targets, targets)))
    # One query per target; np.unique returns where each target comes first.
    queries = np.sort(texts[np.unique(clip_set.targets[texts], return_index=True)[1]])
    covered = np.isin(clip_set.targets, targets[: max(1, round(coverage * len(targets)))])
    others = np.setdiff1d(np.flatnonzero(covered), queries)
    wording = clip_set.texts if clip_set.other_wording is None else clip_set.other_wording
    bank = clip_set.texts[others] if len(others) else wording[covered]
    return Task(clip_set.texts[queries], clip_set.images, clip_set.relevant[queries], bank, clip_set.targets[queries])


def sample(texts, count, seed):
    """Returns `count` of the texts, drawn without replacement."""
    return texts[np.random.default_rng(seed).choice(len(texts), min(count, len(texts)), replace=False)]
