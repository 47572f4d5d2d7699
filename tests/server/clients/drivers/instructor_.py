"""instructor: an object, by a schema, as JSON, and by a call."""

import instructor
import openai
from common import JSON, LOOP, run
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel


class look(BaseModel):
    """Looks up."""

    city: str
    days: int


def ask(url, mode, says, model="tiny"):
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode
    )
    messages = [{"role": "user", "content": says}]
    found = client.chat.completions.create(
        model=model, messages=messages, response_model=look, max_retries=0, max_tokens=900
    )
    return found.model_dump()


def errors(url):
    try:
        ask(url, instructor.Mode.TOOLS, LOOP, "absent")
    except InstructorRetryException as error:
        return error.__cause__.status_code


run(
    {
        "structured": lambda url: ask(url, instructor.Mode.JSON_SCHEMA, JSON),
        "structured (object)": lambda url: ask(url, instructor.Mode.JSON, JSON),
        "structured (call)": lambda url: ask(url, instructor.Mode.TOOLS, LOOP),
        "errors": errors,
    }
)
