"""The pages: lists, runs, candidates, comparisons, as HTML; forms post here and are answered with a page."""

from fastapi import APIRouter

router = APIRouter()
